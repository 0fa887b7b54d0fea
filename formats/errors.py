"""Every error a user can cause or meet. The message is one line: what, where, and what would be right."""


class LLMInt8Error(Exception):
    """The base of all errors below."""


class CorruptFileError(LLMInt8Error):
    """A weight file whose structure is broken, whatever it belongs to."""


class SourceError(LLMInt8Error):
    """The source checkpoint cannot be read or must not be converted."""


class OutputError(LLMInt8Error):
    """The output directory cannot be written."""


class CheckpointError(LLMInt8Error):
    """An int8 checkpoint breaks a rule of spec.md, section "Validation"; `code` is the rule's."""

    def __init__(self, code: str, message: str) -> None:
        """Prefix the message with the rule's code, such as `E07`."""
        super().__init__(f"{code} {message}")
        self.code = code
