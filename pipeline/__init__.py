"""The stages of a run and what they are made of. Prints nothing; progress goes through ``Reporter``."""
