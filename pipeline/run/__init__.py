"""Shared parts of all stages: the run, opening its models, identity, upstream stages, progress, interrupts."""
