"""The device that the tests run on: the CPU, or with `pytest --device cuda` a GPU, virtual or real."""

import os

# From the environment, so that processes that tests start have it too.
DEVICE = os.environ.get("TDPO_TEST_DEVICE", "cpu")
USE_CPU = DEVICE == "cpu"  # as transformers' option
