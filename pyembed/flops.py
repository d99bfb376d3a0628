"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: the products that the plan runs, two operations for
each multiplication and addition; gathers, norms and turns count nothing, as PyTorch's own."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops, ops_distinct  # noqa: F401  they register the operators


@register_flop_formula(torch.ops.pyembed.embed_qkv)
def _embed_qkv(ids, token, weight, *others, out_shape=None, **options):
    return 2 * math.prod(ids) * math.prod(weight)


@register_flop_formula(torch.ops.pyembed.embed_qkv_backward)
def _embed_qkv_backward(hidden, query, key, value, ids, token, weight, *others, out_shape=None, **options):
    return _products(others[-1], query, key, value) * 2 * math.prod(ids) * math.prod(weight)


@register_flop_formula(torch.ops.pyembed.distinct_qkv)
def _distinct_qkv(ids, token, weight, *others, out_shape=None, **options):
    projected = out_shape[6]
    return 2 * projected[0] * math.prod(weight)


@register_flop_formula(torch.ops.pyembed.distinct_qkv_backward)
def _distinct_qkv_backward(hidden, query, key, value, ids, token, weight, *others, out_shape=None, **options):
    projected = others[6]
    return _products(others[-1], query, key, value) * 2 * projected[0] * math.prod(weight)


def _products(needs, *grads):
    """Of a backward: one for the weight, one for what lies before the projection."""
    if all(grad is None for grad in grads):
        return 0
    token, weight, _, position, norm_weight, norm_bias, *segment = needs
    return weight + any((token, position, norm_weight, norm_bias, *segment))
