"""Attention functions that stand in for those of transformers."""
