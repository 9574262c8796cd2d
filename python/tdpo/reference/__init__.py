"""The frozen reference: how it is chosen, and its hidden states on disk."""
