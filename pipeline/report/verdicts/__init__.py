"""Verdicts: a run's faults in plain words, and the headline."""
