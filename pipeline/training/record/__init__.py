"""Everything that training leaves behind: checkpoints, metrics, samples, the final model."""
