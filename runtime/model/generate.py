"""Text from a prompt, piece by piece as it is generated."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from llmint8.converter.model.build import model_class
from llmint8.converter.model.config import load_config
from llmint8.converter.words import count, first_line, size
from llmint8.formats import LLMInt8Error

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

    The model's generation config says which tokens begin and end a text, and how likely ones are penalized. Beams,
    several texts, candidates to check and the like are for others: this is one text, token by token.

    Raises:
        ValueError: the temperature is negative, or the prompt has no tokens.
        LLMInt8Error: the chat template cannot be applied.

    """
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature!r}, expected a number that is not negative")
    inputs = _encode(tokenizer, prompt, chat_template, model.device)
    prompt_tokens = int(inputs["input_ids"].shape[1])
    if not prompt_tokens:
        raise ValueError(f"prompt is {prompt!r}, expected some text")
    streamer = _Pieces(tokenizer, write)
    config = _generation_config(model, temperature)
    config.max_new_tokens, config.pad_token_id = max_new_tokens, _pad(tokenizer)
    with _only(model, config):
        start = time.perf_counter()
        output = model.generate(**inputs, generation_config=config, tokenizer=tokenizer, streamer=streamer)
    first = 1 if model.config.is_encoder_decoder else prompt_tokens
    seconds = [moment - start for moment in streamer.moments]
    return Generation("".join(streamer.pieces), prompt_tokens, int(output.shape[1]) - first, seconds)


def statistics(model: Any, done: Generation) -> list[str]:
    """Return lines for a reader: times, speed, and the largest memory of this process so far."""
    lines = [f"First token    {done.token_seconds[0]:.2f} s, after {count(done.prompt_tokens, 'token')} of prompt"]
    if is_compiled(model) and len(done.token_seconds) > 2:
        lines += [f"Compilation    {done.token_seconds[2] - done.token_seconds[0]:.1f} s, with two more tokens"]
    if done.tokens_per_second is not None:
        lines += [f"Then           {done.tokens_per_second:.1f} tokens per second, {done.new_tokens} in all"]
    if model.device.type == "cuda":
        lines += [f"GPU memory     {size(torch.cuda.max_memory_allocated(model.device))} at most"]
    if sys.platform != "win32":
        lines += [f"Memory         {size(_peak_memory())} at most"]
    return lines


def _peak_memory() -> int:
    """Return the largest resident memory of this process, in bytes."""
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def require_text_model(path: Path, trust_remote_code: bool = False) -> None:
    """Check that the model of a checkpoint continues text, before it is loaded. Unknown ones are left to `load`.

    Raises:
        SourceError: config.json is not valid.
        LLMInt8Error: its class does not generate, or takes something else than text.

    """
    config = load_config(path, trust_remote_code)
    cls = None if config is None else model_class(config)
    if cls is None:
        return
    if not cls.can_generate():
        raise LLMInt8Error(f"{path}: {cls.__name__} does not generate text; runtime.load gives the model to call it")
    if cls.main_input_name != "input_ids":
        raise LLMInt8Error(f"{path}: {cls.__name__} takes {cls.main_input_name}, and there is only a prompt to give it")


# What a generation config says of a text, whichever way it is generated, and of drawing tokens.
_OF_THE_TEXT = (
    *("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "stop_strings"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "min_length", "min_new_tokens", "remove_invalid_values", "use_cache"),
)
_OF_DRAWING = ("top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "renormalize_logits")
_OF_COMPILING = ("cache_implementation", "compile_config")


def _generation_config(model: Any, temperature: float) -> GenerationConfig:
    """Return what the model's generation config says of one text that is streamed, and nothing else."""
    names = _OF_THE_TEXT + (_OF_DRAWING if temperature else ()) + (_OF_COMPILING if is_compiled(model) else ())
    found = {name: getattr(model.generation_config, name, None) for name in names}
    config = GenerationConfig(**{name: value for name, value in found.items() if value is not None})
    config.do_sample = bool(temperature)
    if temperature:
        config.temperature = temperature
    return config


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Keep `generate` from adding what the model's own generation config says."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


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


def _encode(tokenizer: Any, prompt: str, chat_template: bool, device: torch.device) -> dict[str, torch.Tensor]:
    if chat_template and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        try:
            found = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program
            raise LLMInt8Error(
                f"the chat template cannot be applied ({first_line(error)}); --no-chat goes on without it"
            ) from None
    else:
        found = tokenizer(prompt, return_tensors="pt")
    # Some tokenizers give more than most models take.
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask") if name in found}


def _pad(tokenizer: Any) -> int | None:
    """Return the id to pad with; without one, transformers warns in every call."""
    found: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return found
