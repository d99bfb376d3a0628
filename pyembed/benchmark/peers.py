"""The ways to compute one row that run beside ours: stock modules, torch.compile, norms of other libraries, and the bound."""

import copy
import functools
import importlib
import os
import shlex
import shutil
import sys

import torch
import torch.nn.functional as nnf

import pyembed

from .timing import Variant, assert_close, capture, results

PLANS = ("one_pass", "distinct", "table", "auto")
COMPILERS = {"torch.compile": None, "max-autotune": "max-autotune-no-cudagraphs"}  # graphs are the row's, or none
NORMS = ("Liger", "FLA", "QuACK")
PEERS = (*COMPILERS, *(f"{library} norm" for library in NORMS), "Liger")  # who may be missing, or wrong
BOUND = "linear alone"  # the projection of rows that are normalised already: PyTorch's matrix product and no more


def compiler_missing(device):
    """Why torch.compile cannot run here; None: it can."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    if device.type == "cpu" and not shutil.which(shlex.split(os.environ.get("CXX") or default)[0]):
        return "no C++ compiler"
    return None


def compiled(module, mode=None):
    return torch.compile(module, fullgraph=True, dynamic=False, mode=mode)


def with_module(module, name, replacement):
    """The same module over the same weights, with one of its submodules replaced."""
    peer = copy.copy(module)
    peer._modules = {**module._modules, name: replacement}
    return peer


def _norm_of(library, kind):
    """A class of norms that another library has, called with a width and eps."""
    if library == "Liger":
        found = importlib.import_module("liger_kernel.transformers")
        if kind == "rms":
            return functools.partial(found.LigerRMSNorm, in_place=False)
        return functools.partial(found.LigerLayerNorm, bias=True)
    if library == "FLA":
        found = importlib.import_module("fla.modules")
        return found.RMSNorm if kind == "rms" else functools.partial(found.LayerNorm, bias=True)
    if kind != "rms":
        raise ImportError("QuACK's LayerNorm has no backward and takes fp32 weights alone")
    return importlib.import_module("quack.rmsnorm").QuackRMSNorm


def _with_norm(stock, library):
    """The stock modules, their norm another library's over the same weights."""
    device = stock.norm.weight.device
    if device.type != "cuda":
        raise ImportError("its kernels want a GPU")
    norm = _norm_of(library, stock.model.norm)(stock.model.D, eps=stock.norm.eps).to(device, stock.norm.weight.dtype)
    for name, parameter in stock.norm.named_parameters():
        setattr(norm, name, parameter)
    return with_module(stock, "norm", norm)


def _bound(stock, ids, trains):
    with torch.no_grad():
        hidden = stock(ids)[0]
        normed = stock.norm(hidden).requires_grad_(trains)
    parameters = [normed, *stock.qkv.parameters()]
    return Variant(lambda: (nnf.linear(normed, stock.qkv.weight, stock.qkv.bias),), parameters, checked=False)


def front_ends(stock, ids, trains, wanted, tell=lambda what: None):
    """{name: Variant} over the weights of stock, and {name: why it is missing}. Ours must run; a peer may not. tell(name): is
    called before each is built."""
    parameters, found, left_out = list(stock.parameters()), {}, {}
    makers = {"eager": lambda: stock}
    for name, mode in COMPILERS.items():
        makers[name] = functools.partial(compiled, stock, mode)
    for library in NORMS:
        makers[f"{library} norm"] = functools.partial(_with_norm, stock, library)
    torch.compiler.reset()  # its cache is per code object, and falls back to eager when it is full
    for name, make in makers.items():
        if name not in wanted:
            continue
        reason = compiler_missing(ids.device) if name in COMPILERS else None
        if reason:
            left_out[name] = reason
            continue
        tell(name)
        try:
            module = make()
            found[name] = Variant(functools.partial(module, ids), parameters)
            if name != "eager":
                with torch.set_grad_enabled(trains):
                    found[name].forward()
        except Exception as error:  # whatever another library does on this machine
            found.pop(name, None)
            left_out[name] = reason_of(error)
    if BOUND in wanted:
        found[BOUND] = _bound(stock, ids, trains)
    for plan in PLANS:
        if plan in wanted and not (trains and plan == "table"):
            context = functools.partial(pyembed.plan, plan)
            try:
                with context(), torch.set_grad_enabled(trains):
                    module = stock.fused()
                    module.explain(ids)
            except RuntimeError as error:  # a plan that does not take this model says so
                left_out[plan] = str(error)
                continue
            found[plan] = Variant(functools.partial(module, ids), parameters, context)
    return found, left_out


def gradients(variants, trains):
    """{name: random gradients of its outputs}; None where no training is measured. One draw for all that give the same."""
    if not trains:
        return None
    drawn, found = {}, {}
    for name, variant in variants.items():
        with variant.context():
            shapes = tuple(tuple(output.shape) for output in variant.forward())
        if shapes not in drawn:
            like = variant.parameters[0]
            drawn[shapes] = [torch.randn(shape, device=like.device, dtype=like.dtype) for shape in shapes]
        found[name] = drawn[shapes]
    return found


def check(variants, grads, reference="eager"):
    """Every variant gives what `reference` gives, before any is timed: a peer that does not is left out, ours raises."""
    expected = results(variants[reference], grads and grads[reference])

    def compare(name, variant):
        if name != reference and variant.checked:
            try:
                assert_close(results(variant, grads and grads[name]), expected)
            except AssertionError as error:
                raise AssertionError(f"{name} gives other results than {reference}: {error}") from None
        return variant

    return _each(variants, compare)


def capture_all(variants):
    """Makes a CUDA graph of each; returns what was left out."""
    pool = torch.cuda.graph_pool_handle()
    return _each(variants, lambda name, variant: capture(variant, pool))


def _each(variants, function):
    """variants[name] = function(name, variant). A peer that fails is left out, and why it did is returned; ours raises."""
    left_out = {}
    for name, variant in list(variants.items()):
        try:
            variants[name] = function(name, variant)
        except Exception as error:
            if name not in PEERS:
                raise
            del variants[name]
            wrong = isinstance(error, AssertionError)
            left_out[name] = "its results are not those of stock modules" if wrong else reason_of(error)
    return left_out


def reason_of(error):
    """One line of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
