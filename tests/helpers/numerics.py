"""When a result is right: the error budget, and random cases to hold against it."""

import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyembed import reference
from pyembed.call import Call, Norm, Projection, Terms
from pyembed.plans import operators

WAYS = ("few", "rows", "folded")  # of tuning.way
GRADIENTS = ("token", "weight", "bias", "position", "norm_weight", "norm_bias")


def assert_no_worse(name, ours, eager, oracle, factor=2.0, floor=1.0):
    """error(ours) ≤ factor·error(eager) + floor·eps·|oracle|, on the maximum and on the RMS, against a float64 oracle."""
    assert ours.shape == oracle.shape and ours.dtype == eager.dtype, f"{name}: {ours.shape} {ours.dtype}"
    assert not ours.isnan().any(), f"{name}: NaN at {tuple(ours.isnan().nonzero()[0].tolist())}"
    if oracle.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    wrong, theirs = (ours.double() - oracle).abs(), (eager.double() - oracle).abs()
    for kind, size in {"max": torch.amax, "rms": lambda x: x.square().mean().sqrt()}.items():
        budget = factor * size(theirs) + floor * eps * size(oracle.abs())
        worst = tuple(int(i) for i in torch.unravel_index(wrong.argmax(), wrong.shape))
        assert size(wrong) <= budget, (
            f"{name}: {kind} error {size(wrong):.3e}, eager's {size(theirs):.3e}, budget {budget:.3e}; "
            f"worst at {worst}: {ours[worst].item()} for {oracle[worst].item()}"
        )


@contextlib.contextmanager
def tf32(allowed):
    """Within it float32 products on a GPU may use tf32, or may not. (pytest's monkeypatch cannot undo this attribute.)"""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def take(way, monkeypatch):
    """Makes embed_qkv run these kernels, whatever the number of tokens, and choose anew at each call."""
    of = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    (kernels, _), (launcher, _) = operators.launcher("tuning", of), operators.launcher("embed_qkv", of)
    monkeypatch.setattr(kernels, "way", lambda *_: way)
    # Its memory knows nothing of what a test puts in the place of tuning's functions.
    monkeypatch.setattr(launcher, "configure", getattr(launcher.configure, "__wrapped__", launcher.configure))


def guarded(tensor):
    """The same values between rows of NaN (or of ids that no table has): a read past an edge shows."""
    if tensor is None:
        return None
    rows = tensor if tensor.dim() > 1 else tensor.reshape(-1, 1)
    guard = float("nan") if tensor.is_floating_point() else 2**30
    margin = max(1, 256 // max(1, rows[0].numel())) if rows.numel() else 1
    buffer = rows.new_full((rows.shape[0] + 2 * margin, *rows.shape[1:]), guard)
    buffer[margin:-margin] = rows
    return buffer[margin:-margin].view(tensor.shape)


class Largest(TorchDispatchMode):
    """Within it: the elements of the largest result that is no view of what its operator was given, and how many such results
    have how many elements."""

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    @property
    def elements(self):
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.sizes[x.numel()] += 1
        return found


class Case:
    """Random ids, tables, weights and incoming gradients of one front end, and its results in three ways."""

    def __init__(
        self, dtype, device, B=2, T=19, V=31, D=40, heads=3, kv_heads=None, head_dim=7, norm="layer", position="learned",
        bias=True, affine=True, ids_dtype=torch.int64, position_ids=None, padding_idx=None, scale=1.0, seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        kv_heads = kv_heads or heads
        N = (heads + 2 * kv_heads) * head_dim

        def draw(*shape, centre=0.0, spread=1.0):
            return guarded((centre + spread * torch.randn(*shape, generator=g)).to(dtype).to(device))

        self.ids = guarded(torch.randint(V, (B, T) if T is not None else (), generator=g).to(ids_dtype).to(device))
        self.position_ids = None
        L = (T or 1) + 5
        if position_ids is not None:
            shape = {"T": (T,), "1T": (1, T), "BT": (B, T)}[position_ids]
            self.position_ids = guarded(torch.randint(L, shape, generator=g).to(ids_dtype).to(device))
        self.parameters = {
            "token": draw(V, D, spread=scale),
            "weight": draw(N, D, spread=D**-0.5),
            "bias": draw(N) if bias else None,
            "position": draw(L, D, spread=scale) if position else None,
            "norm_weight": draw(D, centre=1.0, spread=0.3) if norm and affine else None,
            "norm_bias": draw(D) if norm == "layer" and affine else None,
        }
        self.options = {"num_heads": heads, "num_kv_heads": kv_heads, "norm": norm, "padding_idx": padding_idx}
        shape = tuple(self.ids.shape)
        shapes = [(*shape, D), (*shape, heads, head_dim), (*shape, kv_heads, head_dim), (*shape, kv_heads, head_dim)]
        self.grads = [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]

    def call(self, **parts):
        """What functional.embed_qkv makes of it; parts: other fields of the Call."""
        p, o = self.parameters, self.options
        padding_idx = -1 if o["padding_idx"] is None else o["padding_idx"] % len(p["token"])
        terms = Terms(self.ids, p["token"], p["position"], self.position_ids, padding_idx=padding_idx)
        norm = Norm(o["norm"] or "none", p["norm_weight"], p["norm_bias"], 1e-5)
        return Call(terms, norm, Projection(p["weight"], p["bias"], o["num_heads"], o["num_kv_heads"]), **parts)

    def run(self, function, dtype=None, backward=True):
        """{name: tensor} of outputs and gradients of function(ids, token, weight, ...), computed in dtype."""
        cast = {k: p if p is None or dtype is None else p.to(dtype) for k, p in self.parameters.items()}
        leaves = {k: None if p is None else p.detach().requires_grad_() for k, p in cast.items()}
        outputs = function(self.ids, **leaves, position_ids=self.position_ids, **self.options)
        results = dict(outputs._asdict())
        if backward:
            named = {k: p for k, p in leaves.items() if p is not None}
            grads = [g.to(outputs.hidden.dtype) for g in self.grads]
            found = torch.autograd.grad(list(outputs), list(named.values()), grads)
            results |= {f"grad of {k}": grad for k, grad in zip(named, found, strict=True)}
        return {k: v.detach() for k, v in results.items()}

    def check(self, function, backward=True, factor=2.0):
        """Holds function against the budget, and hidden against eager's bits; returns its results."""
        ours = self.run(function, backward=backward)
        eager = self.run(reference.embed_qkv, backward=backward)
        oracle = self.run(reference.embed_qkv, torch.float64, backward=backward)
        assert torch.equal(ours["hidden"], eager["hidden"]), "hidden is not eager's, bit for bit"
        for name in oracle:
            assert_no_worse(name, ours[name], eager[name], oracle[name], factor)
        return ours
