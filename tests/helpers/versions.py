"""The checks on machine code under each supported version of Triton, as before a release.

    python tests/helpers/versions.py                            the covering sample of ahead-of-time cases, by every version
    python tests/helpers/versions.py 3.6.0 3.8.0 -- --full      arguments of pytest come after two dashes

Each version is installed into a temporary folder that comes before the environment's own Triton; all else is the environment's.
Exit status: 0, each version passed; 1, one did not.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ["3.6.0", "3.7.1", "3.8.0", "3.9.0"]
# What is known to be wrong with one version, another may have mended.
MENDED = ["--deselect", "tests/kernels/test_ahead_of_time.py::test_known_faults_are_there"]
CASES = ["tests/kernels/test_ahead_of_time.py", "tests/kernels/test_streaming.py"]


def passes(version, arguments):
    """Whether pytest passes with this version of Triton."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
        subprocess.run(install, check=True)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        show = [sys.executable, "-c", "import triton; print('Triton', triton.__version__, triton.__file__)"]
        subprocess.run(show, check=True, env=environment, cwd=ROOT)
        return subprocess.run([sys.executable, "-m", "pytest", *arguments, *MENDED], env=environment, cwd=ROOT).returncode == 0


def main(arguments):
    versions, _, given = " ".join(arguments).partition("--")
    found = {version: passes(version, [*given.split(), *CASES]) for version in versions.split() or VERSIONS}
    for version, passed in found.items():
        print(f"Triton {version}: {'passed' if passed else 'FAILED'}")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
