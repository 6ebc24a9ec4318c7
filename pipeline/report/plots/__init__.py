"""The facts of a run as plots."""
