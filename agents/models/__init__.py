"""Models: by name, made from scratch, with adapters."""
