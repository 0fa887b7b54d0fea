"""Which model at which precision is best for a given number of bits: k-bit weights simulated over a family."""
