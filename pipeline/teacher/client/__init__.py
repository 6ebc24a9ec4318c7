"""Asking for scores: splitting requests, several servers, retries, tropd's service and vLLM's."""
