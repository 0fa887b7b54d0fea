"""How close an int8 model is to its source."""
