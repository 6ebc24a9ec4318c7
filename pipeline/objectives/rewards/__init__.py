"""Rewards in an objective: how they enter, and the formulas."""
