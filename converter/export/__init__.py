"""Int8 checkpoints in the forms that other programs read."""
