"""Action formats: how agents write calls and answers."""
