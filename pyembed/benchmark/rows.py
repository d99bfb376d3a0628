"""One row of the benchmark: every variant checked, timed in turn and compared with its limit; and rows as a table."""

import copy
import functools

import torch
from rich.table import Table

import pyembed

from . import roofline
from .cases import Stock
from .peers import PLANS, capture_all, check, compiler_missing, front_ends, gradients, reason_of
from .timing import Variant, clock, compare, peak_bytes, saved_bytes

SPREAD = 1.25  # third quartile over first: beyond it, something else used the machine meanwhile
WAITED = 0.1  # share of a variant's time for which threads waited for a core: as much, even if all times are alike


def front_end(model, ids, dtype, trains, wanted, seconds, graphs, tell=lambda what, done=None: None):
    """({variant: what was found}, {variant: why it was left out}) of a cases.Model's front end on ids (B, T).

    graphs: replay forwards from CUDA graphs. tell(what, done): is called with what is done now, and the share of it.
    AssertionError: ours gives other results than stock modules."""
    torch.manual_seed(0)
    (_, T), distinct = ids.shape, ids.unique().numel()
    stock = Stock(model, T, ids.device, dtype)
    variants, left_out = front_ends(stock, ids, trains, wanted, tell)
    with torch.set_grad_enabled(trains):
        chosen = stock.fused().explain(ids).name
    rows, more = measure(variants, trains, trains, ids.device, seconds, graphs, tell)
    rates = roofline.measure(ids.device, dtype)
    for name, row in rows.items():
        row["plan"] = chosen if name == "auto" else name
        row["limit"] = {
            direction: roofline.front_end(model, direction, ids.numel(), distinct, T, dtype.itemsize, row["plan"]).seconds(
                rates
            )
            for direction in row["seconds"]
        }
    return rows, left_out | more


def fused_model(model, ids, trains, seconds, tell=lambda what, done=None: None):
    """The same of a whole model that takes ids and of the same model after pyembed.fuse, by each plan that runs there.

    The first tensor of its output that has floating-point numbers is compared; gradients are, by pyembed.fuse. In eval mode.
    ValueError: there is nothing to fuse. pyembed.fuse.Difference: a fused model gives other results."""
    model = model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if trains:
        found = torch.autograd.grad(_output(model, ids)[0].sum(), parameters, allow_unused=True)
        parameters = [p for p, grad in zip(parameters, found, strict=True) if grad is not None]
    variants, left_out = {"eager": Variant(functools.partial(_output, model, ids), parameters)}, {}
    torch.compiler.reset()
    tell("torch.compile")
    try:
        if compiler_missing(ids.device):
            raise RuntimeError(compiler_missing(ids.device))
        variant = Variant(functools.partial(_output, torch.compile(model, dynamic=False), ids), parameters)
        with torch.set_grad_enabled(trains):
            variant.forward()
        variants["torch.compile"] = variant
    except Exception as error:  # whatever a compiler does to this model
        left_out["torch.compile"] = reason_of(error)
    for plan in PLANS:
        tell(f"fuse: {plan}")
        if plan == "table" and trains:
            continue
        twin = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})  # shares the weights
        fused = pyembed.fuse(twin, ids, gradients=trains, strict=True)
        variant = Variant(functools.partial(_output, twin, ids), parameters, functools.partial(pyembed.plan, plan))
        try:
            if plan == "table":
                fused.build_table()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            left_out[plan] = reason_of(error)
            continue
        with variant.context(), torch.set_grad_enabled(trains):
            variant.forward()
        if plan == "auto" or fused.calls["fused"]:
            variants[plan] = variant
        else:
            left_out[plan] = f"the model's own modules ran instead: {next(iter(fused.calls), 'they always do')}"
    rows, more = measure(variants, trains, False, ids.device, seconds, False, tell)
    return rows, left_out | more


def _output(model, ids):
    """(The first floating-point tensor that the model returns,)"""
    leaves = torch.utils._pytree.tree_leaves(model(ids))
    leaves = leaves if isinstance(leaves[0], torch.Tensor) or not hasattr(leaves[0], "to_tuple") else leaves[0].to_tuple()
    return (next(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()),)


def measure(variants, trains, checks_gradients, device, seconds, graphs, tell=lambda what, done=None: None):
    """({variant: its memory and times}, {variant: why it was left out}), after all were found to give the same results.

    Measured once more where a row was busy(), in which case that second time counts."""
    tell("checking results")
    grads = gradients(variants, trains)
    left_out = check(variants, grads if checks_gradients else None)
    rows = {}
    for name, variant in variants.items():
        rows[name] = {"peak": peak_bytes(variant, grads and grads[name], device)}
        rows[name]["saved"] = saved_bytes(variant) if trains else None
    if graphs:
        left_out |= capture_all(variants)
    for what in ("timing", "timing again: the machine was busy"):
        found = compare(variants, grads, clock(device), seconds, functools.partial(tell, what))
        if not any(map(busy, found.values())):
            break
    return {name: rows[name] | found[name] for name in variants}, left_out


def busy(found):
    """Whether another program used the machine meanwhile, in any direction."""
    return any(is_busy(found, direction) for direction in found["seconds"])


def is_busy(found, direction):
    """Whether the quartiles of a variant's times are further apart than SPREAD, or its threads waited for more than WAITED."""
    times = found["seconds"][direction]
    return times["q3"] > SPREAD * times["q1"] or found.get("waited", 0.0) > WAITED


def needed_bytes(model, M, itemsize, trains):
    """About what a row takes: weights (and gradients), table mode's rows, and results several times over."""
    tables = (model.V + (model.L or 0)) * (model.D * (2 if trains else 1) + (0 if trains else model.N))
    return itemsize * (tables + (10 if trains else 5) * M * (model.D + model.N)) + (1 << 30)


def lines(variants, reference="eager"):
    """(variant, direction, median, quartiles, times as fast as `reference` or the first, % of limit), as text, of each."""
    first = variants.get(reference) or next(iter(variants.values()))
    for name, found in variants.items():
        for direction, seconds in found["seconds"].items():
            median, q1, q3 = (seconds[key] * 1e3 for key in ("median", "q1", "q3"))
            limit = found.get("limit", {}).get(direction)
            share = f"{1e5 * limit / median:.0f}" if limit else ""
            ratio = f"{first['seconds'][direction]['median'] * 1e3 / median:.2f}" if direction in first["seconds"] else ""
            mark = " busy" if is_busy(found, direction) else ""
            yield name, direction, digits(median), f"{digits(q1)} … {digits(q3)}{mark}", ratio, share
            name = ""


def digits(number):
    """At least three of them, without an exponent."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"


def as_table(rows):
    """A rich Table of rows, each {"case", "variants", "left_out"}."""
    table = Table("case", "variant", "direction", "median, ms", "quartiles, ms", "times as fast", "% of limit")
    for row in rows:
        case = row["case"]
        for line in lines(row["variants"]):
            table.add_row(case, *line)
            case = ""
        for name, reason in row["left_out"].items():
            table.add_row("", name, "not measured:", "", reason)
        table.add_section()
    return table
