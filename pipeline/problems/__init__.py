"""Problems that a run trains on and is measured by: prompts, encoding, decontamination, grading."""
