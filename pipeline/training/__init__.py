"""Training: the loop, its session, and the processes that train together."""
