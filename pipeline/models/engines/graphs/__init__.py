"""One token per row through a model as a CUDA graph, over a cache whose memory stays where it is."""
