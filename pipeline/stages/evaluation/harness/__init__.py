"""Benchmarks whose questions and judgment are lighteval's, while tropd writes the responses."""
