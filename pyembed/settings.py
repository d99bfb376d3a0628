"""Settings of the process, each changed within a context manager: backend, plan, what happens to bad ids, and debug."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

BACKENDS = ("auto", "triton", "torch")
PLANS = ("auto", "one_pass", "distinct", "table")
ID_POLICIES = ("raise", "clamp", "zero", "trust")


class Settings(NamedTuple):
    """All settings in one value: one comparison tells whether two calls ran under the same ones."""

    backend: str = "auto"
    plan: str = "auto"
    id_policy: str = "raise"
    debug: bool = False


current = Settings()


@contextlib.contextmanager
def _changed(**setting: Any) -> Iterator[None]:
    """Only this setting is put back at the end, so contexts of different settings may overlap."""
    global current
    before = {name: getattr(current, name) for name in setting}
    current = current._replace(**setting)
    try:
        yield
    finally:
        current = current._replace(**before)


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Within it, calls run by Triton kernels ("triton"), by PyTorch's own operators ("torch"), or as fits ("auto").

    "auto" takes the kernels on a GPU and PyTorch's operators on a CPU. "triton" with CPU tensors runs the kernels in Triton's
    interpreter: right, and slow. ValueError: another name. The setting is the process's, as torch.backends' are.
    """
    return _changed(backend=_one_of("backend", name, BACKENDS))


def plan(name: str) -> contextlib.AbstractContextManager[None]:
    """Within it, embed_qkv and EmbeddingQKV run by this plan: "one_pass", "distinct", "table", or "auto", the plan that is
    predicted to be fastest.

    All plans agree to rounding. "table" is for an EmbeddingQKV without gradients: it builds its table at the first call and
    keeps it until drop_table(); "auto" uses a table that exists and builds none. RuntimeError, at the call: the plan cannot run
    it. ValueError: another name. The setting is the process's.
    """
    return _changed(plan=_one_of("plan", name, PLANS))


def id_policy(name: str) -> contextlib.AbstractContextManager[None]:
    """Within it, what calls do with ids, positions and segments outside their tables; a module's own id_policy goes first.

    "raise"  IndexError that names the first one. On a CPU at once. On a GPU without synchronising: its results are NaN, and the
             next call or backward by one of our kernels on that device, or pyembed.check_ids(), raises and names the first bad
             id; the process goes on.
    "clamp"  The nearest row is used, and gets the gradient.
    "zero"   A row of zeros is used (a rotary position turns nothing), by PyTorch's operators: this policy has no kernel.
    "trust"  Nothing is checked: the kernels' results are NaN without an error. PyTorch's operators check anyway.

    What runs by PyTorch's operators on a GPU (see explain) under "raise" or "trust" ends in PyTorch's device-side assertion.
    ValueError: another name. The setting is the process's.
    """
    return _changed(id_policy=checked_policy(name))


def debug() -> contextlib.AbstractContextManager[None]:
    """Within it, calls on a GPU check the values of ids and of given distinct ids, as on a CPU, and so wait for the device."""
    return _changed(debug=True)


def checked_policy(name: str) -> str:
    """name, if it is an id policy. ValueError: it is not."""
    if name not in ID_POLICIES:
        raise ValueError(f"id_policy: expected one of {ID_POLICIES} (a module's may be None), got {name!r}")
    return name


def policy_of(own: str | None) -> str:
    """The id policy of a call whose module or argument has its own, or None."""
    return current.id_policy if own is None else checked_policy(own)


def _one_of(setting: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"{setting}: expected one of {names}, got {name!r}")
    return name
