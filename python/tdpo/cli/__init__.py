"""The command `tdpo`."""
