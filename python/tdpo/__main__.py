"""`python -m tdpo` runs the command `tdpo`, for launchers that take a module."""

import sys

from .cli import main

sys.exit(main())
