"""GGUF, the files of llama.cpp: read with nothing believed, written beside their place."""
