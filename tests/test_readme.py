"""What README shows is run."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run():
    """The Python blocks, in order, in one namespace; the lines below «Equivalent to» are."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        before = {k: names.get(k) for k in ("hidden", "query", "key", "value")}
        exec(compile(block, "README.md", "exec"), names)
        if "front.qkv(" in block:
            for name, tensor in before.items():
                torch.testing.assert_close(names[name], tensor, msg=name)
    assert names["inputs"].shape == names["targets"].shape == (2, 16)


@pytest.mark.parametrize("command", ["pyembed demo", "python -m pytest"])
def test_commands_are_whole(command):
    """One line each, which installs and runs; CI takes the second from here."""
    assert len(re.findall(rf"^    python -m pip install -c constraints\.txt -e '\.\[\w+\]' && {command}$", README, re.M)) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_kernels_folder_is_no_package():
    """kernels/__init__.py would shadow Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
