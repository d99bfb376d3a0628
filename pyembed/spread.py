"""Calls whose tensors are spread over devices, as DTensors. Nothing of torch.distributed is imported before there is one."""

import functools
import importlib
import inspect

import torch
from torch import Tensor


def has_group() -> bool:
    """Whether there is a process group, without which nothing is spread."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_distributed(*values) -> bool:
    """Whether a value is a DTensor."""
    if not has_group():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(value, DTensor) for value in values)


def local(tensor):
    """What this rank holds of it."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def over_mesh(function):
    """function(ids, …), also of DTensors: ids in shards or whole, all else whole on every rank, as sharding.call has it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not is_distributed(*args, *kwargs.values()):
            return function(*args, **kwargs)
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        return importlib.import_module("pyembed.sharding").call(function, arguments)

    return call


def places(ids: Tensor) -> Tensor:
    """0 … T−1 for ids (..., T): (T,), of a DTensor one like ids."""
    if is_distributed(ids):
        return torch.ones_like(ids).cumsum(ids.dim() - 1) - 1  # of a DTensor in shards, cumsum(-1) is wrong in torch 2.13
    return torch.arange(ids.shape[-1] if ids.dim() else 1, device=ids.device).view(ids.shape[-1:])
