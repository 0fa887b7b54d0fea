"""Files that stay open from one use to the next: opening one takes milliseconds where it lies on a network."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

# So many wait for their next use: fewer than any system allows a process, and more than a conversion has in use.
_MOST_IDLE = 32


class OpenFiles:
    """Files by their paths. Each is lent to one user at a time, who may seek in it; two of one path get two."""

    def __init__(self, open_file: Callable[[Path], FileIO]) -> None:
        """Take what opens a file."""
        self._open = open_file
        self._idle: list[tuple[str, FileIO]] = []  # the one used last at the end; to compare paths takes long
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, path: Path) -> Iterator[FileIO]:
        """Lend a file, at whatever position. Raises what opening it raises."""
        file = self._take(path) or self._open(path)
        try:
            yield file
        finally:
            self._put_back(path, file)

    def _take(self, path: Path) -> FileIO | None:
        with self._lock:
            name = str(path)
            found = next((entry for entry in self._idle if entry[0] == name), None)
            if found is not None:
                self._idle.remove(found)
        return found[1] if found else None

    def _put_back(self, path: Path, file: FileIO) -> None:
        with self._lock:
            self._idle.append((str(path), file))
            surplus = self._idle[:-_MOST_IDLE]
            del self._idle[:-_MOST_IDLE]
        for _, oldest in surplus:
            oldest.close()

    def close(self) -> None:
        """Close the files that are not in use."""
        with self._lock:
            for _, file in self._idle:
                file.close()
            self._idle.clear()

    def __del__(self) -> None:
        """Close what nobody can ask for any more."""
        self.close()
