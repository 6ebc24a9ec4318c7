"""Models: loading, tokenizers, limits, precision."""
