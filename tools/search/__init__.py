"""Search: passages, indices by words and by meaning, fusion, a server and its client."""
