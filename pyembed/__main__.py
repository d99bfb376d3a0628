"""`python -m pyembed` is `pyembed`."""

import sys

from .cli import main

sys.exit(main())
