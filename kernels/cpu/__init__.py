"""The layer on the CPU."""
