"""pyembed.benchmark.roofline, by the name that report.py imports."""

from pyembed.benchmark.roofline import *  # noqa: F403
