"""`python -m tdpo` is the command `tdpo`, for launchers that start modules."""

import sys

from .cli import main

sys.exit(main())
