// What the stand-in for NCCL over the streams of tests/simt offers beyond NCCL's own functions.
#pragma once

extern "C" {
// From its n-th sum on the device on (1 is the next that any rank begins), every communicator
// reports a failed peer, and sums that wait for one go on waiting until they are aborted.
void simtNcclFailAfter(int sums);
// What a real NCCL would not have borne so far: sums that some ranks recorded and others did not,
// calls on a stream whose capture is lost, communicators that ended while a graph held their work.
int simtNcclMisuses();
}
