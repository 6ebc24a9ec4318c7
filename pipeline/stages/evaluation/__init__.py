"""Evaluation: accuracy, and the distance between student and teacher on held-out prompts."""
