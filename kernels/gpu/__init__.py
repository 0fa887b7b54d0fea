"""The layer on a GPU, in Triton."""
