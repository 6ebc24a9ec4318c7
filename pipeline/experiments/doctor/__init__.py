"""Differences between the parts of a run that compute log-probs of the same tokens."""
