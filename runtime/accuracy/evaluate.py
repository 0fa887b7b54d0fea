"""How far a model is from its 16-bit reference on a text: KL divergence, top-1 agreement, perplexity.

Reference and candidates run on the same windows of tokens. A window is one forward pass without padding and without a
cache. Logits are asked for and compared a few positions at a time, so that memory does not hold those of a window;
beside that it takes four bytes per token and candidate: the median and the 99th percentile are exact.

Compared are the positions whose next token lies in the window, all but the last. Logits are taken in float32; the KL
of a model with itself comes out as 0, that of two models is good to about 1e-6 nats.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import LLMInt8Error

Logits = Callable[[slice], Tensor]  # positions of a window -> their logits [P, V]

# Positions compared at a time, so that the temporaries stay small beside the logits, whatever the vocabulary.
_POSITIONS = 64
# Enough for almost every text; where it is not, all of the text is tokenized.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Measurement:
    """One candidate against the reference. KL(reference || candidate) of the next-token distribution is in nats."""

    name: str
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float  # 0 to 1: how often both give the same token the largest logit
    perplexity: float


@dataclass(frozen=True)
class Evaluation:
    """What `measure` found, over so many positions."""

    positions: int
    reference_perplexity: float
    measurements: list[Measurement]


def measure(
    runs: Iterable[tuple[Tensor, Logits, Mapping[str, Logits]]],
    positions: int = _POSITIONS,
    progress: Callable[[str], None] = lambda name: None,
) -> Evaluation:
    """Compare candidates with the reference on windows of tokens.

    Args:
        runs: for each window its token ids, int64 [W] with W >= 2; the logits of the model to compare with; and those
            of the others, by the name to report.
        positions: so many logits are asked for at a time.
        progress: called with an empty name after each window.

    Raises:
        LLMInt8Error: the reference's logits are not finite, or a candidate's have another shape.

    """
    loss, compared = 0.0, 0
    tallies: dict[str, _Tally] = {}
    for window, reference, candidates in runs:
        for start in range(0, len(window) - 1, positions):
            places = slice(start, min(start + positions, len(window) - 1))
            targets = window[1:][places]
            expected = _log_probabilities(reference, places)
            if not bool(expected.isfinite().all()):
                raise LLMInt8Error("the reference gives logits that are not finite; there is nothing to compare with")
            loss -= _sum_at(expected, targets)
            likeliest = expected.argmax(1)
            for name, candidate in candidates.items():
                got = _log_probabilities(candidate, places)
                tallies.setdefault(name, _Tally()).add(expected, likeliest, got, targets)
            compared += len(targets)
        progress("")
    if not compared:
        raise ValueError("no windows to measure on")
    measurements = [tally.measurement(name) for name, tally in tallies.items()]
    return Evaluation(compared, _perplexity(loss, compared), measurements)


@dataclass
class _Tally:
    """What is known of one candidate so far."""

    kl: list[Tensor] = field(default_factory=list)  # float32 [positions of a window] on the CPU
    agreements: int = 0
    loss: float = 0.0  # nats

    def add(self, expected: Tensor, likeliest: Tensor, got: Tensor, targets: Tensor) -> None:
        """Add log probabilities [P, V]; of the first the largest in each row [P]; and the tokens that followed [P]."""
        if got.shape != expected.shape:
            raise LLMInt8Error(
                f"the vocabulary has {got.shape[-1]} tokens, that of the reference {expected.shape[-1]}; "
                "is this the model it was made from?"
            )
        for start in range(0, len(expected), _POSITIONS):
            log_p, log_q = (log[start : start + _POSITIONS] for log in (expected, got))
            self.kl.append((log_p.exp() * (log_p - log_q)).sum(1).cpu())
        self.agreements += int((likeliest == got.argmax(1)).sum())
        self.loss -= _sum_at(got, targets)

    def measurement(self, name: str) -> Measurement:
        """Sum up."""
        kl = torch.cat(self.kl).double()
        median, p99 = kl.quantile(kl.new_tensor([0.5, 0.99])).tolist()
        perplexity = _perplexity(self.loss, len(kl))
        return Measurement(name, float(kl.mean()), median, p99, self.agreements / len(kl), perplexity)


def _log_probabilities(logits: Logits, places: slice) -> Tensor:
    """Return the log probabilities of the next token, float32 [P, V]."""
    return logits(places).float().log_softmax(1)


def _sum_at(log_probabilities: Tensor, targets: Tensor) -> float:
    found = log_probabilities.gather(1, targets.to(log_probabilities.device)[:, None])
    return float(found.sum(dtype=torch.float64))


def _perplexity(loss: float, positions: int) -> float:
    return float(torch.tensor(loss / positions, dtype=torch.float64).exp())


def token_windows(tokenizer: Any, text: str, tokens: int, window: int) -> Tensor:
    """Cut the beginning of a text into windows of token ids, int64 [tokens // window, window].

    A token that the tokenizer sets before every text begins every window: models that were trained with one are lost
    without it. No window overlaps another.

    Raises:
        ValueError: `tokens` is less than a window, or the text has fewer tokens.

    """
    count = tokens // window
    if not count:
        raise ValueError(f"{tokens} tokens are less than a window of {window}; ask for more tokens or smaller windows")
    bos = tokenizer.bos_token_id
    first = [] if bos is None or tokenizer("")["input_ids"][:1] != [bos] else [bos]
    needed = count * (window - len(first))
    ids: list[int] = []
    for part in (text[: needed * _CHARACTERS_PER_TOKEN], text):
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            rows = torch.tensor(ids[:needed]).reshape(count, -1)
            return torch.cat([torch.tensor(first, dtype=torch.int64).expand(count, -1), rows], dim=1)
    raise ValueError(f"the text has {len(ids)} tokens, {needed} are needed for {count} windows of {window}")
