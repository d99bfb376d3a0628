"""What README shows is run."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch):
    """The Python blocks, in order, in one namespace; the lines below «Equivalent to» are."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
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


def calls_of(path):
    """(function, arguments, arguments by keyword), as their source, of every call in a file."""
    text = path.read_text(encoding="utf-8")
    for part in re.findall(r"```python\n(.*?)```", text, re.S) if path.suffix == ".md" else [text]:
        for node in ast.walk(ast.parse(part)):
            if isinstance(node, ast.Call):
                named = {k.arg: ast.unparse(k.value) for k in node.keywords}
                yield ast.unparse(node.func), [ast.unparse(argument) for argument in node.args], named


def test_files_are_loaded_without_running_code():
    """By safetensors, or torch.load(weights_only=True): a pickle runs what it holds. Tests copy modules by one, in memory."""
    found = (*ROOT.rglob("*.py"), *ROOT.rglob("*.md"))
    outside = {".git", "site-packages"}  # an environment may lie within the checkout
    paths = [path for path in found if outside.isdisjoint(path.relative_to(ROOT).parts)]
    assert {"front_end.py", "README.md", "bench_front.py", "test_embedding.py", "setup.py"} <= {path.name for path in paths}
    unsafe = ("pickle.load", "Unpickler", "dill.load", "joblib.load", "marshal.load", "marshal.loads", "shelve.open")
    for path in paths:
        for function, given, named in calls_of(path):
            where = f"{path.relative_to(ROOT)}: {function}"
            assert not function.endswith(unsafe) and named.get("allow_pickle") != "True", where
            if function.endswith("pickle.loads"):
                assert "tests" in path.parts and given[0].startswith("pickle.dumps("), where
            if function == "torch.load":
                assert named.get("weights_only") == "True", where
