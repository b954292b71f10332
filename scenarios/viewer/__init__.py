"""The viewer: a page over runs."""
