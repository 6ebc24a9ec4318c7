"""What all stages share: the run, opening its models, identity, upstream stages, progress, interrupts."""
