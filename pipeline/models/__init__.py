"""Models: loading, tokenizers, limits, precision, engines."""
