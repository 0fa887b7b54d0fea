"""The layer of k bits on a GPU, in Triton."""
