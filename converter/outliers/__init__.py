"""Which input columns of each layer stay in 16 bit."""
