"""The store: trees on disk, a run's folder, listings, salvage."""
