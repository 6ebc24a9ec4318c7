"""Rewards of the student's responses: from the grader, from a function of the user's, or as stored."""
