"""`python -m tdpo` runs the command `tdpo`, for launchers that take a module."""

import sys

from .cli.main import main

sys.exit(main())
