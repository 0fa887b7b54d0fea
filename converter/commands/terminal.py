"""What comes from files goes to a terminal: in messages, and through the logs of libraries that know no caution."""

import logging
import re
import traceback
from typing import Any

_LONGEST_LINE = 4000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def without_commands(text: str) -> str:
    """Return text without what a terminal would obey: all but printable characters and line breaks become `?`."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in _COLOUR.sub("", text))


def harmless_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Make a log record that is safe to print, whoever logs; for `logging.setLogRecordFactory`."""
    record = logging.LogRecord(*args, **kwargs)
    try:
        record.msg, record.args = without_commands(record.getMessage()), ()
    except Exception:  # arguments that do not fit the message are told by the handler, as always
        return record
    if record.exc_info and record.exc_info[0]:
        record.exc_text = without_commands("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return record


def printable(text: str) -> str:
    """Return text from a file in one line of bounded length, without what a terminal would obey."""
    return without_commands(text.strip()[:_LONGEST_LINE]).replace("\n", " ")


def printable_lines(lines: list[str]) -> str:
    """Join lines, each made safe for a terminal."""
    return "\n".join(printable(line) if line.strip() else "" for line in lines)
