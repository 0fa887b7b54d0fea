"""Memory that has been freed, given back to the system."""

import ctypes
import os


def return_freed_memory() -> None:
    """Give freed memory back to the system where the C library, glibc, would keep it.

    Layers come and go in sizes that do not fill each other's gaps: without this, memory grows with every layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
