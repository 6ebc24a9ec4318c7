"""The teacher while training: wire format, client, service."""
