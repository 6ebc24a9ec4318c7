"""The facts of a run as pages: HTML, and the model card."""
