"""Checks before a run: the machine against the needs of every stage, from arithmetic and configuration files alone."""
