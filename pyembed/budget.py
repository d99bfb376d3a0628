"""When a result is right: its error against float64 beside that of PyTorch's operators."""

import math
from typing import Any

import torch
from torch import Tensor


def judge(ours: Tensor, eager: Tensor, exact: Tensor, is_hidden: bool) -> dict[str, Any]:
    """Errors, budget (2 · eager's error + eps · exact, of maximum and RMS) and verdict; hidden must have eager's bits too."""
    eps = torch.finfo(ours.dtype).eps
    error, other, scale = _size_of(exact - ours), _size_of(exact - eager), _size_of(exact)
    budget = {key: 2 * other[key] + eps * scale[key] for key in scale}
    row: dict[str, Any] = {"ours": error, "eager": other, "budget": budget}
    over = [key for key in budget if not error[key] <= budget[key] < math.inf]  # written so that NaN is over budget
    if is_hidden:
        row["bit_equal"] = torch.equal(ours.view(torch.uint8), eager.view(torch.uint8))
        over += [] if row["bit_equal"] else ["bits"]
    return {**row, "verdict": f"OVER ({', '.join(over)})" if over else "ok"}


def _size_of(tensor: Tensor) -> dict[str, float]:
    norm = torch.linalg.vector_norm
    return {"max": norm(tensor, math.inf).item(), "rms": norm(tensor).item() / math.sqrt(tensor.numel())}
