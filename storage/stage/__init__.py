"""A stage on disk: its folder, lock, manifest and fingerprint."""
