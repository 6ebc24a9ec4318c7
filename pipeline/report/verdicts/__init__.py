"""Verdicts: what went wrong in a run, said plainly, and the headline."""
