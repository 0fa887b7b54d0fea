"""Text from a prompt, piece by piece as it is generated."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from .compiled import is_compiled


@dataclass(frozen=True)
class Generation:
    """What a call of `stream_chat` did.

    Attributes:
        text: all of it.
        prompt_tokens: their number.
        new_tokens: their number.
        token_seconds: from the start to each new token, so that the first covers the prompt. With a model loaded with
            `compile=True` the second covers the compilation, and on CUDA the third the capture of its graph.

    """

    text: str
    prompt_tokens: int
    new_tokens: int
    token_seconds: list[float]

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return self.token_seconds[-1]

    @property
    def tokens_per_second(self) -> float | None:
        """From the third token on, when everything has been set up; None for fewer than four."""
        if len(self.token_seconds) < 4:
            return None
        return (len(self.token_seconds) - 3) / (self.token_seconds[-1] - self.token_seconds[2])


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
    first = 1 if model.config.is_encoder_decoder else prompt_tokens
    seconds = [moment - start for moment in streamer.moments]
    return Generation("".join(streamer.pieces), prompt_tokens, int(output.shape[1]) - first, seconds)


def statistics(model: Any, done: Generation) -> list[str]:
    """Return lines for a reader: times, speed, and the largest memory of this process so far."""
    lines = [f"First token    {done.token_seconds[0]:.2f} s, after {done.prompt_tokens} tokens of prompt"]
    if is_compiled(model) and len(done.token_seconds) > 2:
        lines += [f"Compilation    {done.token_seconds[2] - done.token_seconds[0]:.1f} s, with two more tokens"]
    if done.tokens_per_second is not None:
        lines += [f"Then           {done.tokens_per_second:.1f} tokens per second, {done.new_tokens} in all"]
    if model.device.type == "cuda":
        lines += [f"GPU memory     {torch.cuda.max_memory_allocated(model.device) / 1e9:.2f} GB at most"]
    if sys.platform != "win32":
        lines += [f"Memory         {_peak_memory() / 1e9:.2f} GB at most"]
    return lines


def _peak_memory() -> int:
    """Return the largest resident memory of this process, in bytes."""
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Passes text on and keeps it, and the moments at which tokens came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self.moments: list[float] = []
        self._write = write

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.moments.append(time.perf_counter())
        super().put(value)

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
