"""The report on a conversion, in pictures."""
