"""The model that runs: loaded, saved, its generation."""
