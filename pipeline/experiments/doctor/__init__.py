"""How far the parts of a run are apart that compute log-probs of the same tokens."""
