"""Extrapolation of the weights after an update, as data; ``training/extrapolation`` does it."""
