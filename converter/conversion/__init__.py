"""The conversion itself, and the comparison with its source."""
