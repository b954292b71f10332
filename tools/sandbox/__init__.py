"""Sandboxes: interpreters that fork with their episode, behind walls that hold; files and shells in them."""
