"""Starting a run on one's own models: a look at them and at the prompts, and the configuration that fits."""
