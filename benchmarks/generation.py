"""The moments at which a model's tokens come, for the benchmarks of generation."""

import time
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Keeps the moment at which each token came; the prompt is the first."""

    def __init__(self) -> None:
        """Start without any."""
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        """Take note of a token, of every sequence in the batch."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def by_transformers(model: Any, prompt: Tensor, tokens: int) -> list[float]:
    """Generate so many tokens greedily after a prompt, int64 [batch, length]; return when each was on the host."""
    clock = Clock()
    model.generate(
        prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    return clock.moments[1:]


def steps_per_second(moments: list[float]) -> float:
    """Return the speed from the second token on, when everything has been set up."""
    return (len(moments) - 2) / (moments[-1] - moments[1])
