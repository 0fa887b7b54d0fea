"""Models as llama.cpp has them, and as transformers does: names, rows, what is said of them, tokenizers."""
