"""Grading of responses: answers as text, choices and mathematics."""
