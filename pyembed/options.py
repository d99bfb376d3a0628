"""What the commands of `pyembed` share: errors of usage, names of dtypes, and whether results can be written."""

from pathlib import Path
from typing import Any

import torch
import typer

UsageError: Any = typer.BadParameter.__base__  # click's, not exported by typer, whose newer versions contain a copy of click
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_plot(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot: expected a name that ends in .png, .svg or .pdf, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error


def check_writable(text: Path | None, json_file: Path | None, plot: Path | None) -> None:
    """Fails early, before the long computation, if a result could not be written after it."""
    check_plot(plot)
    resolved = [path.resolve() for path in (text, json_file, plot) if path]
    if len(set(resolved)) < len(resolved):
        raise UsageError("--text, --json and --plot: expected different files")
    for option, path in (("--json", json_file), ("--plot", plot)):
        if path is None:
            continue
        try:
            existed = path.exists()
            path.open("ab").close()
            if not existed:
                path.unlink()
        except OSError as error:
            raise UsageError(f"{option}: cannot write {path}: {error.strerror}") from error
