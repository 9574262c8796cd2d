"""The paper's controlled-sentiment experiment at small scale, through the public trainer and library."""

from ..extras import require_extra

require_extra("demo")
