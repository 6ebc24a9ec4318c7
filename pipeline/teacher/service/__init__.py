"""Answering requests for scores."""
