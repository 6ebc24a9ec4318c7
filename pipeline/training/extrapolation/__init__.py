"""Extrapolation of the student's weights beyond an update, as far as held-out problems approve (EffOPD)."""
