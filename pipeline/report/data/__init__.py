"""The facts of a run as data."""
