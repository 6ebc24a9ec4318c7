"""Distance to the teacher and accuracy on held-out prompts while training."""
