#!/usr/bin/env python3
"""Writes a llama-shaped GGUF with random weights, of any size, with nothing but Python's standard library.

The text it generates is noise; sizes, types and layout are real, so memory, placement and fault handling can be
tested on models far larger than what the project could carry.

  make_gguf.py big.gguf --dim 2048 --layers 16 --ffn 5632 --type q8_0
"""
import argparse
import array
import random
import struct

# GGUF value types and tensor types, see the GGUF specification.
U32, F32, BOOL, STRING, ARRAY, I32 = 4, 6, 7, 8, 9, 5
#        id, elements of a block, bytes of a block
TYPES = {'f32': (0, 1, 4), 'f16': (1, 1, 2), 'q4_0': (2, 32, 18), 'q8_0': (8, 32, 34)}
ALIGNMENT = 32
POOL_BLOCKS = 32768  # random blocks are drawn once and repeated: drawing gigabytes would take minutes


def text(value):
    raw = value.encode()
    return struct.pack('<Q', len(raw)) + raw


def scalar(kind, value):
    if kind == STRING:
        return struct.pack('<I', kind) + text(value)
    return struct.pack('<I' + {U32: 'I', I32: 'i', F32: 'f', BOOL: '?'}[kind], kind, value)


def values(kind, items):
    body = b''.join(text(i) if kind == STRING else struct.pack('<f' if kind == F32 else '<i', i) for i in items)
    return struct.pack('<IIQ', ARRAY, kind, len(items)) + body


def byte_vocabulary(size):
    """A SentencePiece-like vocabulary: three special tokens, all bytes, words up to the asked size."""
    pieces = ['<unk>', '<s>', '</s>'] + [f'<0x{b:02X}>' for b in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    words = [f'\u2581w{i}' for i in range(size - len(pieces))]
    pieces += words
    kinds += [1] * len(words)
    return pieces, [0.0] * 259 + [-float(i) for i in range(len(words))], kinds


def pool(rng, kind, std):
    """POOL_BLOCKS blocks whose values have about this standard deviation."""
    if kind in ('f32', 'f16'):
        numbers = [rng.gauss(0, std) for _ in range(POOL_BLOCKS)]
        return array.array('f', numbers).tobytes() if kind == 'f32' else struct.pack(f'<{POOL_BLOCKS}e', *numbers)
    payload = TYPES[kind][2] - 2
    spread = 74.0 if kind == 'q8_0' else 4.6  # standard deviation of a uniform int8, of a uniform nibble
    scales = struct.pack(f'<{POOL_BLOCKS}e', *(std / spread * rng.uniform(0.75, 1.25) for _ in range(POOL_BLOCKS)))
    noise = rng.randbytes(POOL_BLOCKS * payload)
    return b''.join(scales[2 * i:2 * i + 2] + noise[payload * i:payload * (i + 1)] for i in range(POOL_BLOCKS))


def tensors(args):
    """(name, dims with the contiguous one first) in the order a forward pass needs them."""
    head = args.dim // args.heads
    ffn = (('ffn_gate', (args.dim, args.ffn)), ('ffn_up', (args.dim, args.ffn)), ('ffn_down', (args.ffn, args.dim)))
    if args.experts:
        ffn = (('ffn_gate_inp', (args.dim, args.experts)), *((f'{n}_exps', (*dims, args.experts)) for n, dims in ffn))
    yield 'token_embd.weight', (args.dim, args.vocab)
    for i in range(args.layers):
        for name, dims in (('attn_norm', (args.dim,)), ('attn_q', (args.dim, args.dim)),
                           ('attn_k', (args.dim, head * args.kv_heads)), ('attn_v', (args.dim, head * args.kv_heads)),
                           ('attn_output', (args.dim, args.dim)), ('ffn_norm', (args.dim,)), *ffn):
            yield f'blk.{i}.{name}.weight', dims
    yield 'output_norm.weight', (args.dim,)
    yield 'output.weight', (args.dim, args.vocab)


def size_of(kind, dims):
    elements = 1
    for d in dims:
        elements *= d
    _, block, size = TYPES[kind]
    assert dims[0] % block == 0, f'{dims[0]} is no multiple of the {block} elements of a {kind} block'
    return elements // block * size


def metadata(args):
    pieces, scores, kinds = byte_vocabulary(args.vocab)
    meta = {
        'general.architecture': scalar(STRING, 'llama'),
        'general.name': scalar(STRING, 'random weights'),
        'llama.context_length': scalar(U32, args.context),
        'llama.embedding_length': scalar(U32, args.dim),
        'llama.block_count': scalar(U32, args.layers),
        'llama.feed_forward_length': scalar(U32, args.ffn),
        'llama.attention.head_count': scalar(U32, args.heads),
        'llama.attention.head_count_kv': scalar(U32, args.kv_heads),
        'llama.attention.layer_norm_rms_epsilon': scalar(F32, 1e-5),
        'llama.rope.dimension_count': scalar(U32, args.dim // args.heads),
        'llama.rope.freq_base': scalar(F32, 10000.0),
        'llama.vocab_size': scalar(U32, args.vocab),
        'tokenizer.ggml.model': scalar(STRING, 'llama'),
        'tokenizer.ggml.tokens': values(STRING, pieces),
        'tokenizer.ggml.scores': values(F32, scores),
        'tokenizer.ggml.token_type': values(I32, kinds),
        'tokenizer.ggml.bos_token_id': scalar(U32, 1),
        'tokenizer.ggml.eos_token_id': scalar(U32, 2),
        'tokenizer.ggml.add_bos_token': scalar(BOOL, True),
    }
    if args.experts:
        meta['llama.expert_count'] = scalar(U32, args.experts)
        meta['llama.expert_used_count'] = scalar(U32, 2)
    if args.chat_template:
        meta['tokenizer.chat_template'] = scalar(STRING, args.chat_template)
    return meta


def write_data(out, rng, plan, args):
    pools = {args.type: pool(rng, args.type, args.dim ** -0.5), 'norm': array.array('f', [1.0] * 4096).tobytes()}
    for _, dims, kind, size in plan:
        source = pools['norm' if len(dims) == 1 else kind]
        # Each tensor starts elsewhere in the pool, so that no two are equal.
        start = 0 if len(dims) == 1 else rng.randrange(POOL_BLOCKS) * TYPES[kind][2]
        source = source[start:] + source[:start]
        whole, rest = divmod(size, len(source))
        for _ in range(whole):
            out.write(source)
        out.write(source[:rest] + b'\0' * (-size % ALIGNMENT))


def write(path, args):
    rng = random.Random(args.seed)
    meta = metadata(args)
    plan = []  # (name, dims, type, bytes)
    for name, dims in tensors(args):
        kind = 'f32' if len(dims) == 1 else args.type
        plan.append((name, dims, kind, size_of(kind, dims)))
    infos, offset = b'', 0
    for name, dims, kind, size in plan:
        infos += text(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, TYPES[kind][0], offset)
        offset += size + -size % ALIGNMENT
    head = b'GGUF' + struct.pack('<IQQ', 3, len(plan), len(meta))
    head += b''.join(text(key) + value for key, value in meta.items()) + infos
    with open(path, 'wb') as out:
        out.write(head + b'\0' * (-len(head) % ALIGNMENT))
        write_data(out, rng, plan, args)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out')
    parser.add_argument('--dim', type=int, default=256)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--kv-heads', type=int, default=4)
    parser.add_argument('--ffn', type=int, default=768)
    parser.add_argument('--experts', type=int, default=0, help='of each layer, two of them for a token')
    parser.add_argument('--vocab', type=int, default=1024)
    parser.add_argument('--context', type=int, default=4096)
    parser.add_argument('--type', choices=sorted(TYPES), default='q8_0')
    parser.add_argument('--chat-template', help='Jinja source; without one the model does not chat')
    parser.add_argument('--seed', type=int, default=1)
    args = parser.parse_args(argv)
    if args.dim % args.heads or args.heads % args.kv_heads or args.vocab < 259:
        parser.error('heads must divide dim, kv-heads must divide heads, vocab must be at least 259')
    return args


if __name__ == '__main__':
    arguments = parse()
    write(arguments.out, arguments)
