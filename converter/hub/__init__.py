"""Checkpoints from the Hub and to it."""
