"""The commands that fill one folder of the workspace, other than training."""
