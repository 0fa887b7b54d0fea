"""What a model takes in 16 bit and in int8, and which GPUs hold it; no weight is read for it."""
