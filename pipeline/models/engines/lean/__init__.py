"""Decoding for CPUs, where the general decoder spends its time outside the model."""
