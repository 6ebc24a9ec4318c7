"""What a run trains on and is measured by: the parts of a problem."""
