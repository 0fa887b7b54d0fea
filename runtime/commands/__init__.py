"""The command `llmint8`."""
