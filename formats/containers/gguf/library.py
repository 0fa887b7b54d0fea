"""gguf-py, which knows the blocks that GGUF packs numbers into; it is an extra."""

from typing import Any

from ...errors import LLMInt8Error


def gguf_py() -> Any:
    """Return the package. Raises LLMInt8Error where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise LLMInt8Error("GGUF takes the package gguf, which is not installed: pip install 'llmint8[gguf]'") from None
    return gguf
