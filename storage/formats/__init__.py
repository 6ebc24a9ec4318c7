"""File formats: each has one module that writes and reads it."""
