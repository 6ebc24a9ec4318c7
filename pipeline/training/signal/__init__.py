"""Data from the teacher for the rows of a step: asked for, or read from the cache."""
