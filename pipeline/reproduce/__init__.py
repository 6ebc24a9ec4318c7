"""The paper's tables: what is in them, how they are made, and a rehearsal with tiny models."""
