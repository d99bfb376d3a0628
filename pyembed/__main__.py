"""`python -m pyembed` runs the command line, as `pyembed` does."""

import sys

from .cli import main

sys.exit(main())
