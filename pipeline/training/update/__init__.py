"""From rows to a step of the optimizer."""
