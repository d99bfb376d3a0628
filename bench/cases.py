"""pyembed.benchmark.cases, by the name that report.py imports."""

from pyembed.benchmark.cases import *  # noqa: F403
