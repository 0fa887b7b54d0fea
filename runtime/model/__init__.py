"""The model that runs: loaded, its layers, its generation."""
