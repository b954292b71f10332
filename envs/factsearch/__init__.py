"""FactSearch: questions over a corpus that is searched."""
