"""Every variant of the launchers' calls, over meta tensors, at the sizes at which a configuration changes."""

import itertools

import torch
from pyembed.kernels import distinct, distinct_grad, embed, embed_grad, embed_qkv, expand, gather, keys, rotary

from pyembed.call import Call, Epilogue, Norm, Projection, Terms

FOLDED = 40_000  # tokens, enough to fold the norm into the weight of any of these calls


def meta(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="meta")


def reported(*shape):
    """Where the kernels of a call over ids of this shape report those without a row."""
    return meta(6), shape[-1]


def norm_of(kind, D, dtype, affine=True):
    vector = meta(D, dtype=dtype) if affine else None
    return Norm(kind, vector if kind != "none" else None, vector if kind == "layer" else None, 1e-5)


def front_end(dtype, M, D, N, norm, position, bias=True, affine=True, ids=torch.int64, transposed=False):
    """One call of the launcher over meta tensors."""
    weight = meta(D, N, dtype=dtype).t() if transposed else meta(N, D, dtype=dtype)
    places, positions = meta(1, M, dtype=ids) if position == "ids" else None, meta(8192, D, dtype=dtype) if position else None
    terms = Terms(meta(1, M, dtype=ids), meta(50257, D, dtype=dtype), positions, places)
    projection = Projection(weight, meta(N, dtype=dtype) if bias else None, 1, 1)
    embed_qkv.embed_qkv(Call(terms, norm_of(norm, D, dtype, affine), projection), reported(1, M))


def mixed(dtype, M, norm, rotates=False):
    """Under autocast: 16-bit products over a table of another dtype, forward and backward."""
    terms = Terms(meta(1, M), meta(50257, 768, dtype=dtype), meta(8192, 768, dtype=dtype))
    cos = meta(8192, 32, dtype=torch.float32)
    epilogue = Epilogue(cos=cos, sin=cos) if rotates else Epilogue()
    projection = Projection(meta(2304, 768, dtype=torch.bfloat16), meta(2304, dtype=torch.bfloat16), 12, 12)
    call = Call(terms, norm_of(norm, 768, dtype), projection, epilogue)
    *_, mean, rstd = embed_qkv.embed_qkv(call, reported(1, M))
    if norm != "none":
        rows, grad = meta(M, 768, dtype=dtype), meta(M, 768, dtype=torch.bfloat16)
        embed_grad.norm_backward(call, mean, rstd, grad, rows, True, torch.bfloat16)


def backward(dtype, M, D, norm, position):
    rows, terms = meta(M, D, dtype=dtype), Terms(meta(1, M), meta(50257, D, dtype=dtype))
    if position:
        terms = terms._replace(position=meta(8192, D, dtype=dtype))
    mean, rstd = meta(M if norm == "layer" else 0, dtype=torch.float32), meta(M, dtype=torch.float32)
    vector = meta(D, dtype=dtype)
    call = Call(terms, Norm(norm, vector, vector if norm == "layer" else None))
    for wanted in (rows, None):  # with frozen tables and norm, only normed is computed
        embed_grad.norm_backward(call, mean, rstd, wanted, wanted, wanted is not None, dtype)
    embed_grad.table_grad(rows, meta(M), 50257)
    embed_grad.table_grad(rows, meta(M), 50257, out=meta(50257, D, dtype=dtype), adds=True)
    for told in (reported(1, M), None):  # of a forward, and within the backward of embed_qkv
        embed.embed(terms, told)


def distinct_rows(dtype, M, D, N, norm, position, trains=True, affine=True, index=None, transposed=False):
    """The `distinct` plan, forward and backward. position: None, True (0 … T−1), "ids" or "gathered"."""
    weight = meta(D, N, dtype=dtype).t() if transposed else meta(N, D, dtype=dtype)
    B, T = (2, M // 2) if position is True else (1, M)
    L = 1024 if position == "ids" else 8 * M
    places = meta(B, T) if position in ("ids", "gathered") else None
    given = (None, None) if index is None else (meta(M // 3, dtype=index), meta(B * T, dtype=index))
    terms = Terms(meta(B, T), meta(50257, D, dtype=dtype), meta(L, D, dtype=dtype) if position else None, places)
    call = Call(terms, norm_of(norm, D, dtype, affine), Projection(weight, meta(N, dtype=dtype), 1, 1))
    hidden, query, key, value, *found = distinct.forward(call, *given, report=reported(B, T))
    if trains:
        needs = {"token", "weight", "bias"}
        needs |= {f"norm_{part}" for part in ("weight", "bias") if getattr(call.norm, part) is not None}
        into = None if index is None else meta(50257, D, dtype=dtype)
        needs |= {"position"} if position else set()
        distinct_grad.backward(call, (hidden, query, key, value), *found, needs, into)


def look_up(dtype, M, D, N, norm, position, entries):
    """A call by the `table` plan."""
    token, table = meta(50257, D, dtype=dtype), meta(1024, D, dtype=dtype) if position else None
    projected = meta(50257 + (1024 if position else 0), N, dtype=entries)
    offset = meta(N, dtype=torch.float32) if position else None
    norm = Norm(norm if position else "none", eps=1e-5)
    call = Call(Terms(meta(1, M), token, table), norm, Projection(meta(N, D, dtype=dtype), None, 1, 1))
    expand.look_up(call, projected, offset, 0.5, reported(1, M))


def turned(dtype, M, rotary_dim, interleaved, given=False, many=True):
    """The kernels that turn heads, of 64 columns each: one pass, a batch's and a table's expand, and the way back."""
    cos = meta(M if given else 8192, rotary_dim // 2, dtype=torch.float32)
    epilogue = Epilogue(cos=cos, sin=cos, turn_ids=None if given else meta(M), interleaved=interleaved)
    terms, report = Terms(meta(1, M), meta(50257, 768, dtype=dtype)), reported(1, M)
    projection = Projection(meta(2304, 768, dtype=dtype), None, 12, 12)
    call = Call(terms, norm_of("rms", 768, dtype), projection, epilogue)
    embed_qkv.embed_qkv(call, report)
    if many:
        distinct.forward(call, report=report)
        projected, offset = meta(50257 + 1024, 2304, dtype=dtype), meta(2304, dtype=torch.float32)
        terms = terms._replace(position=meta(1024, 768, dtype=dtype))
        expand.look_up(call._replace(terms=terms, norm=Norm("layer", eps=1e-5)), projected, offset, report=report)
        rotary.turn_back(meta(1, M, 12, 64, dtype=dtype), epilogue)


def terms(dtype, M, norm):
    """Hidden of many terms, forward and backward: segments, scale and dropout, with a table of positions or computed ones."""
    token, segment, seed = meta(50257, 768, dtype=dtype), meta(2, 768, dtype=dtype), meta(1)
    ids, sines = meta(2, M // 2), meta(2, 768)
    several = [
        Terms(ids, token, meta(8192, 768, dtype=dtype), None, segment, ids, seed, None, 0.1),
        Terms(ids, token, sines, scale=27.7),
        Terms(ids, token, sines, ids, segment, None, seed, 27.7, 0.1),
    ]
    for each in several:
        call = Call(each, norm_of(norm, 768, dtype), Projection(meta(2304, 768, dtype=dtype), None, 12, 12))
        embed.embed(each, reported(2, M // 2))
        *_, mean, rstd = embed_qkv.embed_qkv(call, reported(2, M // 2))
        rows = meta(M, 768, dtype=dtype)
        if norm != "none":
            embed_grad.norm_backward(call, mean, rstd, rows, rows, True, dtype)
        elif each.seed is not None:
            embed.drop_again(rows, each)


def gathered(dtype, M, D, scale):
    """Rows of two tables, of some vocabulary and of the patches of images."""
    ids, values, token, own = meta(2, M // 2), meta(16), meta(50257, D, dtype=dtype), meta(M // 2 + 16, D, dtype=dtype)
    streams = [50257, -1], [M // 2, 16], [meta(0), values], [meta(0), values], [5, 6]
    found = keys.find_keys(ids, 50257, *streams, False, reported(2, M // 2))
    keys.find_keys(ids.int(), 50257, *([x[-1]] for x in streams), True, reported(2, M // 2))
    used, *_ = keys.find_used(found, 50257 + len(own))
    for each in (found, used):
        gather.gather(each, token, own, scale)
        gather.gather_backward(token.new_empty(*each.shape, D), each, scale, -1, 50257, [50257, len(own)])


def ends(dtype, M, head_dim, norms, second, interleaved, first, norm="rms"):
    """Epilogues: heads normalised, a second query, turns and heads before tokens, as they may come together."""
    cos, head = meta(8192, head_dim // 2, dtype=torch.float32), meta(head_dim, dtype=dtype) if norms else None
    epilogue = Epilogue(head, head, meta(16 * head_dim, dtype=dtype) if second else None, head_eps=1e-6, heads_first=first)
    if interleaved is not None:
        epilogue = epilogue._replace(cos=cos, sin=cos, interleaved=interleaved)
    terms = Terms(meta(2, M // 2), meta(50257, 768, dtype=dtype))
    projection = Projection(meta(48 * head_dim, 768, dtype=dtype), None, 16, 16)
    embed_qkv.embed_qkv(Call(terms, norm_of(norm, 768, dtype), projection, epilogue), reported(2, M // 2))


def llama(dtype, M, products=None):
    """Llama-3-8B's front end, forward and backward; its projection of another dtype, as under autocast; many: by `distinct`."""
    vector, cos = meta(4096, dtype=dtype), meta(8192, 64, dtype=torch.float32)
    projection = Projection(meta(6144, 4096, dtype=products or dtype), None, 32, 8)
    terms = Terms(meta(1, M), meta(128_256, 4096, dtype=dtype))
    call = Call(terms, Norm("rms", vector, None, 1e-5), projection, Epilogue(cos=cos, sin=cos))
    *_, mean, rstd = embed_qkv.embed_qkv(call, reported(1, M))
    rows, grad = meta(M, 4096, dtype=dtype), meta(M, 4096, dtype=products or dtype)
    embed_grad.norm_backward(call, mean, rstd, grad, rows, True, products or dtype)
    if M == 4097 and products is None:
        outputs = distinct.forward(call, report=reported(1, M))
        distinct_grad.backward(call, outputs[:4], *outputs[4:], {"token", "weight", "norm_weight"})


def every_call():
    """(whether products use tf32, function, its arguments): every variant at the sizes at which a configuration changes."""
    combinations = list(itertools.product(("layer", "rms", "none"), (True, False)))
    calls = []
    for dtype, (norm, position) in itertools.product((torch.bfloat16, torch.float32), combinations):
        for M in (1, 17, 199, 513, 4097, FOLDED):
            calls.append((False, front_end, dtype, M, 768, 2304, norm, position))
        for M in (17, 4097, FOLDED):
            calls.append((False, front_end, dtype, M, 771, 2313, norm, position))
    for M in (1, 17, 199, 513):  # fp16 differs from bf16, and tf32 from fp32, in the name of an instruction
        calls.append((False, front_end, torch.float16, M, 768, 2304, "layer", True))
        calls.append((True, front_end, torch.float32, M, 768, 2304, "layer", True))
    for dtype, M in itertools.product((torch.bfloat16, torch.float32), (17, 4097, FOLDED)):
        variant = (False, front_end, dtype, M, 768, 2304)
        calls += [(*variant, "layer", True, False), (*variant, "layer", "ids"), (*variant, "rms", False, True, False)]
        calls += [
            (*variant, "layer", True, True, True, torch.int32),
            (*variant, "layer", True, True, True, torch.int64, True),
        ]
    for dtype, D, norm in itertools.product(
        (torch.bfloat16, torch.float32), (64, 771, 2048, 5120, 8192, 16384), ("layer", "rms")
    ):
        calls.append((False, backward, dtype, 4097, D, norm, norm == "layer"))
    calls += [(False, distinct_rows, torch.bfloat16, 4098, 768, 2304, *variant) for variant in combinations]
    for dtype in (torch.bfloat16, torch.float32):
        calls.append((False, distinct_rows, dtype, 4098, 4096, 6144, "rms", None))
        calls.append((False, distinct_rows, dtype, 4098, 771, 2313, "layer", True))
        for position in (True, "ids", "gathered"):
            calls.append((False, distinct_rows, dtype, 4098, 768, 2304, "layer", position))
        calls.append((False, distinct_rows, dtype, 4098, 768, 2304, "layer", True, True, False, torch.int64, True))
        calls += [(False, distinct_rows, dtype, 4098, D, 2304, "layer", True) for D in (5120, 8192, 16384)]
    calls.append((False, distinct_rows, torch.float16, 4098, 768, 2304, "layer", True, False))
    calls.append((True, distinct_rows, torch.float32, 4098, 768, 2304, "layer", True))
    for dtype, entries in (
        (torch.bfloat16,) * 2,
        (torch.float16,) * 2,
        (torch.float32,) * 2,
        (torch.float32, torch.bfloat16),
    ):
        for M, (norm, position) in itertools.product((1, 4098), (("layer", True), ("rms", True), ("none", False))):
            calls.append((False, look_up, dtype, M, 768, 2304, norm, position, entries))
    for dtype, (rotary_dim, interleaved) in itertools.product(
        (torch.bfloat16, torch.float32), ((64, False), (64, True), (16, False))
    ):
        for M in (1, 17, 199, 513, 4097, FOLDED):
            calls.append((False, turned, dtype, M, rotary_dim, interleaved, False, M in (1, 4097)))
    calls.append((False, turned, torch.float16, 513, 64, False, True))
    for dtype, M in itertools.product((torch.bfloat16, torch.float32), (2, 4098, FOLDED)):
        calls += [(False, terms, dtype, M, norm) for norm in ("layer", "rms", "none")]
    calls.append((False, terms, torch.bfloat16, 200, "layer"))
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (64, 768, 771, 4096)):
        calls += [(False, gathered, dtype, 4098, D, scale) for scale in (None, 27.7)]
    for M in (1, 17, 199, 513, 4097):
        calls += [(False, mixed, torch.float32, M, norm) for norm in ("layer", "rms", "none")]
        calls.append((False, mixed, torch.float32, M, "rms", True))
    calls.append((False, mixed, torch.float16, 513, "layer"))
    for M in (1, 17, 199, 513, 4097, FOLDED):
        calls += [(False, llama, dtype, M) for dtype in (torch.bfloat16, torch.float16)]
        calls += [(False, llama, torch.float32, M, dtype) for dtype in (torch.bfloat16, torch.float16)]
    calls += [(True, llama, torch.float32, M) for M in (1, 199, 4097)]
    for dtype, M in itertools.product((torch.bfloat16, torch.float32), (2, 20, 200, 514, 4098, FOLDED)):
        for head_dim in (64, 128, 256):
            calls.append((False, ends, dtype, M, head_dim, True, False, False, True))
        calls.append((False, ends, dtype, M, 64, False, True, None, True))
    for dtype, M in itertools.product((torch.bfloat16, torch.float32), (2, 4098, FOLDED)):
        calls += [(False, ends, dtype, M, head_dim, True, False, None, False) for head_dim in (128, 256)]
        calls += [(False, ends, dtype, M, head_dim, True, False, False, True) for head_dim in (16, 32)]
        calls.append((False, ends, dtype, M, 128, True, False, True, True))
        calls.append((False, ends, dtype, M, 64, False, True, None, False, "none"))
        calls.append((False, ends, dtype, M, 64, False, False, False, True))
    return calls
