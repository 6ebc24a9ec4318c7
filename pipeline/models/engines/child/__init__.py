"""An engine in a process of its own beside the one that trains, and how weights, questions and answers get there."""
