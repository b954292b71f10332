"""The treegym command."""
