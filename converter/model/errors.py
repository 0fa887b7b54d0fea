"""What transformers and the code of models raise, in one line."""


def first_line(error: Exception) -> str:
    """Return an error's type and what it says, in one line of bounded length."""
    text = str(error).strip()
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}" if text else type(error).__name__
