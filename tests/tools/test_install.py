"""What an editable install makes importable, by building its wheel from a copy of the package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"
FIND = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
print(importlib.util.find_spec("pyembed").origin)
"""


def ignored(folder, names):
    return [name for name in names if name == "__pycache__" or (Path(folder) / name).is_symlink()]


def test_a_folder_named_as_the_package_hides_nothing(tmp_path):
    """Beside a script there is a clone named pyembed, which Python would take for a namespace package of that name."""
    pytest.importorskip("setuptools", "77")
    clone, site = tmp_path / "pyembed", tmp_path / "site"
    for name in ("pyembed", "kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    # -ES: without PYTHONPATH and this environment's site-packages, where pyembed may be.
    found = subprocess.run(
        [sys.executable, "-ES", "-c", FIND, str(site)], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(clone / "pyembed" / "__init__.py")
