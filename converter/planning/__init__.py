"""What a conversion will do, known before it begins."""
