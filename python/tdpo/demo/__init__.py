"""The paper's controlled-sentiment experiment at small scale, through the public trainer and library."""
