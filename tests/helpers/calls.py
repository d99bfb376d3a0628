"""Random calls for test_fuzz.py: of every public function, right ones and such as must be refused."""

import math
import re
from typing import NamedTuple

import torch
from conftest import DEVICE
from hypothesis import strategies as st
from numerics import guarded
from torch import Tensor

import pyembed
from pyembed import positions
from pyembed.rotary import Rotary

SHAPES = [(2, 3), (), (1,), (5,), (0,), (1, 1), (3, 1), (2, 5), (1, 11), (0, 4), (2, 0), (2, 1, 3)]
HEADS = [(1, 1, 1), (2, 1, 3), (3, 3, 2), (1, 1, 16), (4, 2, 4), (5, 5, 1), (6, 2, 2), (3, 1, 6), (1, 1, 8)]  # H, H_kv, d_h
LAYOUTS = {
    "guarded": guarded,
    "plain": lambda x: x,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() else x,
    "a scalar": lambda x: x.new_full((), 0.37).expand_as(x),  # what sum().backward() hands down
}


class Call(NamedTuple):
    function: str  # of pyembed.functional and pyembed.reference; "module": an EmbeddingQKV, which is the reference's embed_qkv
    ids: Tensor
    parameters: dict[str, Tensor]
    options: dict
    trained: set[str]
    grads: dict[str, Tensor]  # incoming, by output
    error: tuple | None  # what it must raise: type and message


@st.composite
def calls(draw, backend, plan):
    """A call that this backend and plan can run, and in one of four cases something wrong in it."""

    def pick(*choices):
        return draw(st.sampled_from(choices))

    def normal(*shape, centre=0.0, spread=1.0, dtype=None, layouts=tuple(LAYOUTS)[:5]):
        drawn = (centre + spread * torch.randn(shape, generator=g)).to(dtype or dtype_of_all).to(DEVICE)
        return LAYOUTS[pick(*layouts)](drawn)

    def integers(size, *shape):
        drawn = torch.randint(size, shape, generator=g).to(pick(torch.int64, torch.int32)).to(DEVICE)
        return LAYOUTS[pick(*tuple(LAYOUTS)[:5])](drawn)

    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    interpreted = backend == "triton" and DEVICE == "cpu"
    last = [torch.float64] if interpreted else [torch.bfloat16] if backend == "triton" else [torch.float64, torch.bfloat16]
    dtype_of_all = pick(torch.float32, torch.float16, *last)
    function = pick("module", *([] if plan == "table" else ["embed_qkv"]), *(["embed", "embedding"] if plan[0] in "ao" else []))
    projects, may_add = function in ("embed_qkv", "module"), plan in ("auto", "one_pass") and function != "embedding"
    shape, (H, H_kv, d_h) = pick(*SHAPES), pick(*HEADS)
    norm = pick("layer", "rms", None) if projects else None
    # Of a few columns a norm's gradient nearly vanishes: distinct's, a difference of two sums, keeps fewer of its digits.
    widths = (8, 16, 17, 20) if plan == "distinct" and norm else (5, 1, 2, 3, 8, 16, 17, 20)
    V, D, N, T = pick(7, 1, 2, 13), pick(*widths), (H + 2 * H_kv) * d_h, shape[-1] if shape else 1
    L, ids, options = T + pick(1, 0, 4), integers(V, *shape), {"padding_idx": pick(None, 0, V - 1, -V)}
    parameters = {"token": normal(V, D)}
    if function != "embedding":
        exact = (backend, dtype_of_all) == ("triton", torch.float64)  # more than the kernels' sines are
        position = pick("learned", None, *(["computed"] if may_add and not exact else []))
        if position == "learned":
            parameters["position"] = normal(L, D)
        elif position:
            options["position"] = positions.sinusoidal_steps(D).to(DEVICE)
    if may_add and pick(False, True):
        parameters["segment"] = normal(3, D)
        options["segment_ids"] = pick(None, integers(3, *shape), integers(3, *shape[-1:]))
    if may_add:
        options |= {"scale": pick(None, D**0.5, -3), "dropout": pick(0.0, 0.0, 0.0, 0.5, 1.0)}
    if projects:
        wide = torch.promote_types(dtype_of_all, torch.float32)
        # distinct sums bfloat16 gradients in bfloat16, which a float32 norm's gradient shows.
        may_widen = function == "embed_qkv" and (plan, dtype_of_all) != ("distinct", torch.bfloat16)
        affine = pick(dtype_of_all, None, *([wide] if may_widen else []))
        parameters["weight"] = normal(N, D, spread=D**-0.5)
        if pick(True, False):
            parameters["bias"] = normal(N)
        if norm and affine:
            parameters["norm_weight"] = normal(D, centre=1.0, spread=0.3, dtype=affine)
        if norm == "layer" and affine and pick(True, False):
            parameters["norm_bias"] = normal(D, dtype=affine)
        options |= {"num_heads": H, "num_kv_heads": H_kv, "norm": norm, "eps": pick(1e-5, 0.1)}
        R = pick(None, 2, d_h) if d_h % 2 == 0 else None
        end = pick(None, "norms", "biases" if R is None else None)
        options["heads_first"] = bool(shape) and pick(False, True)
        if R and pick(True, False):
            options["rotary"] = Rotary(d_h, max(L, 1), rotary_dim=R, interleaved=pick(False, True)).to(DEVICE)
        elif R:
            angle = torch.randn(pick((*shape, R // 2), (T, R // 2)), generator=g).repeat(*[1] * max(len(shape), 1), 2)[..., :R]
            angle = angle[0] if not shape and angle.dim() > 2 else angle
            options["rotary"] = (angle.cos().to(DEVICE), angle.sin().to(DEVICE))
        if end == "norms":
            parameters |= {name: normal(d_h, centre=1.0, spread=0.3) for name in ("query_norm", "key_norm")}
        elif end == "biases":
            parameters |= {"u": normal(H, d_h), "v": normal(H, d_h)}
        if pick(False, False, True):
            options["distinct"] = pyembed.DistinctIds(*ids.unique(return_inverse=True))
    if "position" in parameters or "position" in options or isinstance(options.get("rotary"), Rotary):
        like = pick(None, (T,), shape, (*(1,) * (len(shape) - 1), T)) if shape else pick(None, ())
        options["position_ids"] = None if like is None else integers(L, *like) if L else None
    outputs = {"hidden": (*shape, D)}
    if projects:
        second = ("u" in parameters) * (2,)
        for name, h in {"query": H, "key": H_kv, "value": H_kv}.items():
            heads = (*shape[:-1], h, T, d_h) if options["heads_first"] else (*shape, h, d_h)
            outputs[name] = (*(second if name == "query" else ()), *heads)
    reached = draw(st.sets(st.sampled_from(sorted(outputs)), max_size=1))  # those that no gradient reaches
    frozen = draw(st.sets(st.sampled_from(sorted(parameters)), max_size=2))
    grads = {k: normal(*s, layouts=tuple(LAYOUTS)) for k, s in outputs.items() if k not in reached}
    call = Call(function, ids, parameters, options, set() if plan == "table" else {*parameters} - frozen, grads, None)
    return draw(faulty(call, plan, V, L)) if pick(False, False, False, True) else call


@st.composite
def faulty(draw, call, plan, V, L):
    """The same call with something wrong in it."""
    function, ids, parameters, options, *_ = call
    given = {"ids": ids, **{k: v for k, v in options.items() if k.endswith("_ids") and v is not None}}
    sizes = {"ids": V, "position_ids": 2**31 - 1 if "position" in options else L, "segment_ids": 3}
    faults = [(name, "dtype", TypeError) for name in given] + [(name, "type", TypeError) for name in given]
    faults += [(name, "shape", ValueError) for name in given if name != "ids"]
    ranges = [(name, "range", IndexError) for name, tensor in given.items() if tensor.numel()]
    if function != "module":
        scalars = {"padding_idx": (V, -V - 1), "dropout": (1.5, -0.5, math.nan), "eps": (-1.0, math.nan), "num_heads": (0, 2.0)}
        scalars |= {"norm": ("batch",), "num_kv_heads": (0,)}
        faults += [(name, value, ValueError) for name in scalars if name in options for value in scalars[name]]
        faults += [(name, "type", TypeError) for name in (*parameters, "scale", "dropout") if name in parameters | options]
        others = [name for name in parameters if name != "token"]
        faults += [(name, "dtype", TypeError) for name in others] + [(name, "shape", ValueError) for name in others]
    if plan in ("distinct", "table"):
        faults.append(("scale", 2.0, RuntimeError))
    name, wrong, error = draw(st.sampled_from(ranges if ranges and draw(st.booleans()) else faults))
    message = {"u": "query_biases", "v": "query_biases"}.get(name, name)
    message = f"plan: '{plan}' cannot run here" if error is RuntimeError else message
    home = parameters if name in parameters else options
    value = ids if name == "ids" else home.get(name)
    if wrong == "range":
        known, size = torch.iinfo(value.dtype), sizes[name]
        beyond = [x for x in (-1, size, 2**31, 2**40, -(2**31), -(2**63)) if known.min <= x <= known.max]
        value = value.clone(memory_format=torch.contiguous_format)
        value.view(-1)[draw(st.integers(0, value.numel() - 1))] = draw(st.sampled_from(beyond))
        place = tuple(((value < 0) | (value >= size)).nonzero()[0].tolist())
        message += rf": expected values in \[0, {size}\).* got {value[place].item()} at {re.escape(str(place))}"
    elif wrong == "dtype":
        value = value.to(torch.bfloat16 if parameters["token"].dtype == torch.float16 else torch.float16)
    elif wrong == "type":
        value = value.tolist() if isinstance(value, Tensor) else "2"
    elif wrong == "shape":
        value = value[..., :-1] if value.is_floating_point() else torch.zeros(9, 9, dtype=torch.long)
    else:
        value = wrong
    if name == "ids":
        if wrong == "range" and "distinct" in options:
            options["distinct"] = pyembed.DistinctIds(*value.unique(return_inverse=True))
        return call._replace(ids=value, error=(error, message))
    return call._replace(**{"parameters" if home is parameters else "options": home | {name: value}}, error=(error, message))
