"""Preference data: reading files, checking rows, tokenizing, and the batches that a step takes."""
