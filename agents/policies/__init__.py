"""Policies: a model in this process, servers, players, scripts."""
