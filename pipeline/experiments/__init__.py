"""Several runs, or a run made for you; and the Python door."""
