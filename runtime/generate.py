"""Text from a prompt, piece by piece as it is generated."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TextStreamer


@dataclass(frozen=True)
class Generation:
    """What a call of `stream_chat` did. `seconds` covers the prompt and the new tokens."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


def stream_chat(
    model: Any,
    tokenizer: Any,
    prompt: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chat_template: bool = True,
) -> Generation:
    """Generate text and hand each piece to `write` as soon as it is whole words.

    Args:
        model: a transformers model that generates.
        tokenizer: its tokenizer.
        prompt: what the user says; with a chat template one turn of a chat.
        write: called in this thread, so an error in it or in the model ends the call.
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn.
        chat_template: use the tokenizer's chat template where it has one.

    Raises:
        ValueError: the temperature is negative, or the prompt has no tokens.

    """
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature!r}, expected a number that is not negative")
    inputs = _encode(tokenizer, prompt, chat_template).to(model.device)
    prompt_tokens = int(inputs["input_ids"].shape[1])
    if not prompt_tokens:
        raise ValueError(f"prompt is {prompt!r}, expected some text")
    streamer = _Pieces(tokenizer, write)
    # None where greedy search has no use for a value that the generation config may set.
    how = {"do_sample": True, "temperature": temperature} if temperature else _GREEDY
    start = time.perf_counter()
    output = model.generate(
        **inputs, **how, max_new_tokens=max_new_tokens, pad_token_id=_pad(tokenizer), streamer=streamer
    )
    seconds = time.perf_counter() - start
    first = 1 if model.config.is_encoder_decoder else prompt_tokens
    return Generation("".join(streamer.pieces), prompt_tokens, int(output.shape[1]) - first, seconds)


_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Passes text on and keeps it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self._write(text)


def _encode(tokenizer: Any, prompt: str, chat_template: bool) -> Any:
    if chat_template and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer(prompt, return_tensors="pt")


def _pad(tokenizer: Any) -> int | None:
    """Return the id to pad with; without one, transformers warns in every call."""
    found: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return found
