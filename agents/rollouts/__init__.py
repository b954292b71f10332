"""Rollouts: the engine that grows trees, strategies, replay."""
