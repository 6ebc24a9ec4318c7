"""Whether a response is right: answers as text, choices and mathematics."""
