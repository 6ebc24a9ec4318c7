"""Checking a workspace without any model."""
