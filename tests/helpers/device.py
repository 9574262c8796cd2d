"""The device that the tests run on: the CPU, or with TDPO_TEST_DEVICE=cuda a GPU, virtual or real."""

import os

# From the environment, which processes that tests start have too.
DEVICE = os.environ.get("TDPO_TEST_DEVICE", "cpu")
USE_CPU = DEVICE == "cpu"  # as transformers' option
