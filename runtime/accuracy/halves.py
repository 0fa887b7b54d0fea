"""A causal language model in two halves: the body, which gives hidden states, and the head, which makes logits of them.

The hidden states of a window are small. Its logits are not: with a vocabulary of 262,144 those of 512 positions take
half a gigabyte. So the body runs on windows, on several at once, and the head on some positions at a time. Both are the
model's own code: the body is made to stop there, or to return what it is given, and whatever the model does with hidden
states and logits, such as a soft cap, it does.

A model that cannot be parted so gives its logits in place of hidden states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Enough to see whether a model can be parted.
_TRIED = 8


class Halves:
    """The two halves of a model. `width` is H of its hidden states."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        """Take a causal language model, and token ids int64 [W] to try it with."""
        self._model = model
        self._body: Any = None
        self._output: Any = None  # what the body returns is made with this
        tokens = tokens[None, :_TRIED]
        whole = self._logits(tokens)[0]
        for body in (model.base_model, model.get_decoder()):  # OPT runs the second, and not the first
            if body is not None and body is not model and self._is_parted(body, tokens, whole):
                break
        else:
            self._body = None
        self.width = int((whole if self._body is None else self.hidden(tokens)).shape[-1])

    def _is_parted(self, body: Any, tokens: Tensor, whole: Tensor) -> bool:
        self._body = body
        try:
            found = self.logits(self.hidden(tokens)[0])
        except Exception:  # code that does not take what it is given is not parted
            return False
        return found.shape == whole.shape and torch.allclose(found, whole, rtol=1e-3, atol=1e-4, equal_nan=True)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the hidden states [R, W, H] of token ids int64 [R, W]."""
        if self._body is None:
            return self._logits(tokens)
        forward = self._body.forward

        def stop(*arguments: Any, **named: Any) -> Any:
            raise _Reached(forward(*arguments, **named))

        with self._replaced(stop):
            try:
                self._logits(tokens)
            except _Reached as reached:
                self._output = type(reached.output)
                found: Tensor = reached.output[0]
                return found
        raise TypeError("the body is not what the model runs")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [P, V] of hidden states [P, H]."""
        if self._body is None:
            return hidden
        output = (hidden[None],) if self._output is tuple else self._output(last_hidden_state=hidden[None])
        with self._replaced(lambda *arguments, **named: output):
            return self._logits(torch.zeros(1, len(hidden), dtype=torch.int64))[0]

    def _logits(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits
        return found

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        self._body.forward = forward
        try:
            yield
        finally:
            del self._body.forward


class _Reached(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    """The body has run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
