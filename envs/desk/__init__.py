"""Desk: applications as pages of text, whose state is a value in Python."""
