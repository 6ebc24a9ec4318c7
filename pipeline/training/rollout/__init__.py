"""Rows to train on: planned, sampled, and prepared a step ahead."""
