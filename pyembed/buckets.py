"""Buckets of distances between query and key, as T5 and DeBERTa share table rows among them (relative.py)."""

import math

import torch
from torch import Tensor


def t5_bucket(distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """distance = query position − key position, integer (...) -> T5's bucket (...) int64; logarithm in fp32, as T5's code."""
    distance = distance.long()
    num_buckets //= 2 if bidirectional else 1
    first = (distance < 0).long() * num_buckets if bidirectional else 0
    distance = distance.abs() if bidirectional else distance.clamp(min=0)
    exact = num_buckets // 2
    logarithm = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def deberta_bucket(distance: Tensor, position_buckets: int, max_distance: int) -> Tensor:
    """distance = query position − key position, integer (...) -> DeBERTa-v2's signed bucket (...) int64; logarithm in fp32."""
    exact = position_buckets // 2
    ends = torch.tensor((max_distance - 1) / exact, dtype=torch.float32, device="cpu").log()
    logarithm = torch.log(distance.abs().clamp(min=exact).float() / exact) / ends
    far = torch.ceil(logarithm * (exact - 1)).long() + exact
    return torch.where(distance.abs() <= exact, distance, far * distance.sign())
