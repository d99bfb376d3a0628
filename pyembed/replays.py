"""Calls by one kernel, of which the second without gradients does no more than to make its outputs and launch.

What a call checks, chooses and compiles depends on its Tensors' shapes, dtypes, devices and strides, and on its options: where
a call before had the same, the launch is that one's, with other pointers.
"""

import torch
from torch import Tensor

from . import checks, direct, ops, ops_embed, planner
from . import ids as outside
from .direct import PLAIN
from .ops import NO_ROTATION
from .reference import HiddenQKV
from .rotary import as_rotation

_replays = {}


def embed(ids, token, position, position_ids, padding_idx, id_policy):
    """functional.embed of a token's row and a position's, by the policy "raise" or "trust"; None: by no kernel."""
    if not planner.uses_triton(token):
        return None
    reports = outside.applied(id_policy) == "raise"
    ids, position_ids = _dense(ids), _dense(position_ids)
    tensors = (ids, token, position, position_ids)

    def call():
        checks.check_embed(ids, token, position, position_ids, None, None, None, 0.0)
        checks.check_positions(ids, position, position_ids)
        row = -1 if padding_idx is None else checks.padding_row(padding_idx, token.shape[0])
        if reports:
            checks.check_ranges(ids, token, position, position_ids)
        return (ops_embed.embed(ids, token, position, position_ids, None, None, None, None, 0.0, row, reports),)

    return _replayed("embed", call, tensors, (padding_idx,), reports, 1)[0]


def embed_qkv(ids, token, weight, bias, groups, position, position_ids, rotary, affine, padding_idx, id_policy):
    """functional.embed_qkv in one pass, as thin.embed_qkv has its arguments; None: another plan may be better."""
    if not planner.runs_one_pass(ids) or planner.autocast_dtype(token) or not planner.uses_triton(token):
        return None
    (heads, kv_heads, _), (norm, norm_weight, norm_bias, eps) = groups, affine
    reports, rotation = outside.applied(id_policy) == "raise", NO_ROTATION
    ids, position_ids = _dense(ids), _dense(position_ids)

    def check():
        checks.check_embed_qkv(
            None, ids, token, position, position_ids, None, None, None, 0.0, weight, bias, heads, kv_heads, *affine, None, None,
            0.0, False,
        )  # fmt: skip
        checks.check_rotary(rotary, ids, weight.shape[0] // sum(groups))
        checks.check_positions(ids, position, position_ids, rotary)

    if rotary is not None:  # what is made of it is part of the key, so it must be right before
        check()
        rotation = as_rotation(rotary, ids, position_ids)
        rotation = rotation._replace(cos=rotation.cos.contiguous(), sin=rotation.sin.contiguous())
    tensors = (ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, *rotation[:3])
    options = (heads, kv_heads, norm, eps, padding_idx, rotation[3])

    def call():
        check()
        row = -1 if padding_idx is None else checks.padding_row(padding_idx, token.shape[0])
        if reports:
            checks.check_ranges(ids, token, position, position_ids, rotary)
        places = None if position is None else position_ids
        return ops.embed_qkv(
            ids, token, weight, bias, position, places, norm_weight, norm_bias, None, None, None, None, heads, kv_heads,
            norm or "none", eps, row, None, 0.0, *rotation, None, None, 0.0, False, reports, False,
        )  # fmt: skip

    return HiddenQKV(*_replayed("embed_qkv", call, tensors, options, reports, 4))


def _dense(ids):
    """A decode step's are often the last column of a batch's, which a launcher would copy, and no replay could."""
    return ids.contiguous() if isinstance(ids, Tensor) else ids


def _replayed(name, call, tensors, options, reports, count):
    """The first `count` outputs of call(), which checks arguments and asks the operator of that name; without gradients, those
    of the launch of a call before that differed in the Tensors' elements alone."""
    ids = tensors[0]
    key = None if direct.is_heard() or planner.looks(ids) else _key(tensors, options)
    if key is None:
        return call()[:count]
    key = (name, reports, torch.backends.cuda.matmul.fp32_precision, *key)
    again, words = _replays.get(key), outside.report_of(ids.device, ids.shape, reports)[0]
    launch = ops.kernels("launch")
    if again is not None:
        outside.look(ids.device)
        with launch.on_device(ids):
            return again(*tensors, words)
    with launch.recorded() as launches:
        outputs = call()
    again = launch.replay(launches, (*tensors, words), outputs, count)
    if again is not None:
        launch.remember(_replays, key, again)
    return outputs[:count]


def _key(tensors, options):
    """All that a launcher and Triton look at; None: a gradient is wanted, or there is a value of another kind."""
    key, grads = [*options, *map(type, options)], torch.is_grad_enabled()
    if not all(of in direct.SCALARS for of in key[len(options) :]):
        return None
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif type(tensor) not in PLAIN or direct.is_strange(tensor) or grads and tensor.requires_grad:
            return None
        else:
            key.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16))
    return key
