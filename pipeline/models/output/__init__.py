"""From hidden states to log-probs, in float32 and in chunks of the vocabulary."""
