"""The top-k cache: shards, their encoding, reading them, and tools on whole caches."""
