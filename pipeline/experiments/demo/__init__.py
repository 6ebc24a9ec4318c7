"""The embedded task and its two tiny models: everything that ``tropd prepare`` makes."""
