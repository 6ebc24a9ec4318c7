"""Formulas: partition, estimators, token weights, loss, prefix schedule. Pure functions and data."""
