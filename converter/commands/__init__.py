"""The commands `llmint8-convert` and `llmint8 push`, and what every command shares."""
