"""The paper's controlled-sentiment experiment in small, through the public trainer and library."""
