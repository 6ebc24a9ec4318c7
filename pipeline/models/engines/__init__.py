"""Engines sample from a model and score tokens with it: transformers, vLLM."""
