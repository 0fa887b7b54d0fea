"""16-bit checkpoints as others wrote them."""
