// What the stand-in for NCCL offers beyond NCCL's own functions: streams, which need no GPU here. A
// stream runs what is enqueued on a thread of its own, in order.
#pragma once

extern "C" {
void* fakeStreamCreate();
// Everything that was enqueued is done.
bool fakeStreamIdle(void* stream);
void fakeStreamDestroy(void* stream);
// From its n-th call on (1 is the next), the communicators of this process report a failed peer and
// move nothing.
void fakeFailAfter(int calls);
}
