"""grow_optimizer(optimizer, growth): the state of an optimizer follows parameters that grew."""

import math
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .growth import Growth

KEY = "new_rows"  # in the state of a parameter: [{"start": first row, "stop": row after the last, "state": their own}, …]
HOOKS = "_pyembed_hooks"
State = dict[str, Any]


def grow_optimizer(optimizer: Optimizer, growth: Growth | None = None) -> None:
    """Makes an optimizer step the parameters that grow() made, in place of those that it had: their state follows.

    State of the old rows keeps its bits, and so do their updates where the optimizer works element by element (Adafactor
    does not: it scales by the whole tensor). New rows start as a parameter does that was never stepped: a carried count of
    steps would make Adam's first update of them 3.15 times the learning rate. PyTorch has one count a parameter, so new rows
    are stepped by themselves, by hooks of this optimizer, with its class and options, until their count no longer matters.
    The count is in the optimizer's state_dict: after loading one, and for a copy of the optimizer, call
    grow_optimizer(optimizer), which registers the hooks again.

    TypeError: no optimizer of torch. ValueError, and the optimizer is as it was: state of a shape that does not tell
    what it has of rows; SparseAdam; an optimizer that would turn a bias of −inf (padding of a head) into NaN, as weight decay
    does that is added to the gradient.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("optimizer: expected dense gradients, got SparseAdam, whose new rows have no step count of their own")
    changes = [] if growth is None else [change for change in growth.changes if change.old() is not None]
    places = {id(p): (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    made = []
    for change in changes:
        old: Any = change.old()
        if id(old) not in places:
            continue
        group, i = places[id(old)]
        if change.new.ndim == 1 and torch.isneginf(change.new.detach()).any():
            _check_padding(optimizer, group)
        state = optimizer.state.get(old)
        made.append((group["params"], i, old, change.new, _longer(state, old, change) if state else None))
    for params, i, old, new, state in made:
        params[i] = new
        optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = state
    _register(optimizer)


def _longer(state: State, old: Tensor, change: Any) -> State:
    """The state of the larger parameter."""
    rows, longer = len(change.new), dict(state)
    own = [{**one, "stop": min(one["stop"], change.start)} for one in state.get(KEY, ()) if one["start"] < change.start]
    if change.stop > change.start:
        own.append({"start": change.start, "stop": change.stop, "state": {}})
    longer[KEY] = own
    for name, value in state.items():
        if not isinstance(value, Tensor) or not _has_rows(name, value, old):
            continue
        longer[name] = value.new_zeros((rows, *value.shape[1:]))
        longer[name][: change.start] = value[: change.start]
    return longer


def _has_rows(name: str, value: Tensor, old: Tensor) -> bool:
    """Whether a tensor of state has a row for each row of its parameter, or none."""
    shape, whole = tuple(value.shape), tuple(old.shape)
    if (
        shape == whole
        or value.ndim == old.ndim > 1
        and shape[0] == whole[0]
        and all(n in (1, m) for n, m in zip(shape, whole, strict=True))
    ):
        return True
    if value.numel() == 1 and len(old) > 1:
        return False
    is_row, is_column = shape == whole[:1], shape in (whole[1:], (1, *whole[1:]))
    if is_row != is_column:
        return is_row
    raise ValueError(f"optimizer: expected state by rows or by columns of a parameter {whole}, got {name} {shape}")


def _check_padding(optimizer: Optimizer, group: State) -> None:
    """That a step leaves −inf as it is, where its gradient is 0."""
    bias = nn.Parameter(torch.tensor([-math.inf, 1.0]))
    small = _alone(optimizer, group, bias)
    for _ in range(2):
        bias.grad = torch.tensor([0.0, 1.0])
        type(small).step(small)
    if bias[0] != -math.inf or not bias[1].isfinite():
        raise ValueError(
            f"optimizer: expected one that leaves a bias of −inf, of a head's padding, as it is, got "
            f"{type(optimizer).__name__} with weight_decay={group.get('weight_decay')}: give biases a group without"
        )


def _alone(optimizer: Optimizer, group: State, parameter: nn.Parameter) -> Optimizer:
    """An optimizer of the same class and options, of one parameter."""
    alone: Any = object.__new__(type(optimizer))
    alone.__dict__.update(optimizer.__dict__)  # grad_scale and found_inf of a GradScaler among them
    for hooks in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        alone.__dict__[f"_optimizer_{hooks}_hooks"] = OrderedDict()
    alone.state = defaultdict(dict)
    alone.param_groups = [{**group, "params": [parameter]}]
    return alone


# Steps of new rows


def _register(optimizer: Any) -> None:
    if any(state.get(KEY) for state in optimizer.state.values()) and HOOKS not in optimizer.__dict__:
        steps = _Steps()
        pre, post = optimizer.register_step_pre_hook(steps.before), optimizer.register_step_post_hook(steps.after)
        optimizer.__dict__[HOOKS] = (pre, post)


class _Steps:
    """Hooks of an optimizer that step new rows by themselves."""

    def __init__(self) -> None:
        self.held: list[tuple[Any, State, State, nn.Parameter]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, *_: Any) -> None:
        """Takes the new rows, with their state and gradient, out of the step of all rows."""
        self.held = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                for own in optimizer.state.get(parameter, {}).get(KEY, ()):
                    rows = slice(own["start"], own["stop"])
                    small = nn.Parameter(parameter[rows].clone())
                    small.grad = parameter.grad[rows].clone()
                    parameter.grad[rows] = 0
                    if own["state"]:
                        own["state"] |= {name: v[rows].clone() for name, v in _by_rows(optimizer.state[parameter], parameter)}
                    self.held.append((parameter, group, own, small))

    @torch.no_grad()
    def after(self, optimizer: Optimizer, *_: Any) -> None:
        held, self.held = self.held, []
        for parameter, group, own, small in held:
            rows, state = slice(own["start"], own["stop"]), optimizer.state[parameter]
            alone = _alone(optimizer, group, small)
            alone.state[small] = own["state"]  # empty before the first step, which makes it
            type(alone).step(alone)
            parameter[rows] = small
            parameter.grad[rows] = small.grad
            for name, value in _by_rows(state, parameter):
                value[rows] = alone.state[small].pop(name)
            own["state"] = alone.state[small]
            if _is_like_others(own["state"], group):
                state[KEY] = [one for one in state[KEY] if one is not own]
        if held and not any(state.get(KEY) for state in optimizer.state.values()):
            for hook in optimizer.__dict__.pop(HOOKS, ()):
                hook.remove()


def _by_rows(state: State, parameter: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, v) for name, v in state.items() if isinstance(v, Tensor) and _has_rows(name, v, parameter)]


def _is_like_others(state: State, group: State) -> bool:
    """Whether new rows need no state of their own any more: there is none, or Adam's corrections by its count are 1."""
    if not state:
        return True
    betas = group.get("betas", ())
    adam = state.keys() == {"step"} and bool(betas) and all(isinstance(beta, float) for beta in betas)
    return adam and all(beta ** int(state["step"]) < 2**-25 for beta in betas)
