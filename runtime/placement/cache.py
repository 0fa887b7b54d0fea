"""What a model needs beside its weights when it runs: keys and values of the tokens so far, and a layer's activations.

What a cache takes is not computed from the config, in which every family has names and rules of its own: the model runs
on the meta device, with two tokens and with three, and what is in the cache then is measured. So it is right for heads
that share keys and values, latents in their place, sliding windows, states of a fixed size, and what a decoder keeps of
its encoder's output.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmint8.converter.machine import same_random_numbers
from llmint8.converter.model.inputs import runs
from llmint8.converter.model.limits import longest_text

from .blocks import block_of
from .parts import HALF, Part

log = logging.getLogger("llmint8")

# Of the widest layer's input and output: gate and up, what is made of them, what that is quantized to. Measured on the
# meta device by the test of this.
_COPIES = 5
# Of each score, where attention makes all of them at once: with the mask and without, in float32 for the softmax, and
# its result. And where each head has a bias of its own for every pair of tokens, as in T5.
_SCORE_BYTES, _BIAS_BYTES = 14, 7


def cache_of(model: Any | None) -> "Cache | None":
    """Return what a model's cache takes.

    Args:
        model: a transformers model on the meta device, or None; it is in bfloat16 and eager after this.

    Returns:
        None where that is not known: nobody knows the model, or it does not run without data.

    """
    if model is None:
        return None
    if not model.can_generate():
        return Cache([])
    try:
        model.to(torch.bfloat16).eval().set_attn_implementation("eager")
        few, more = (_states(model, tokens) for tokens in (2, 3))
    except Exception as error:  # whatever the model's code raises without data
        log.debug("%s does not run on the meta device: %s: %s", type(model).__name__, type(error).__name__, error)
        return None
    blocks = _decoder_blocks(model, len(few))
    if len(blocks) < len(few):
        return None
    grown = [(one, other - one, window) for (one, window), (other, _) in zip(few, more, strict=True)]
    return Cache([State(block, one - 2 * each, each, w) for block, (one, each, w) in zip(blocks, grown, strict=False)])


@dataclass(frozen=True)
class State:
    """What the cache has of one block: bytes of any text, bytes of each token, and the tokens it keeps, or None."""

    block: str
    fixed: int
    each: int
    window: int | None

    def taken(self, context: int) -> int:
        """Return the bytes for a text of so many tokens."""
        return self.fixed + self.each * min(context, self.window or context)


@dataclass(frozen=True)
class Cache:
    """What a model's cache has of all its blocks."""

    states: list[State]

    def taken(self, context: int, batch: int) -> dict[str, int]:
        """Return the bytes of each block for so many texts of so many tokens, in an encoder and in a decoder."""
        return {state.block: batch * state.taken(context) for state in self.states}


def _states(model: Any, tokens: int) -> list[tuple[int, int | None]]:
    """Return the bytes that the cache has of each layer after so many tokens, and how many it keeps; None for all."""
    run = next(runs(model, torch.zeros(1, tokens, dtype=torch.long, device="meta")))
    floats = {key: v.to(torch.bfloat16) if v.is_floating_point() else v for key, v in run.arguments.items()}
    with same_random_numbers(), torch.inference_mode():
        out = model(**floats, use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache_params
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if model.config.is_encoder_decoder else [cache]
    layers = list(zip(*(part.layers for part in parts), strict=True))
    kept = [getattr(layer[0], "sliding_window", None) for layer in layers]
    # The last token is in none of its layers before it is computed with.
    return [(_nbytes(layer), window and window - 1) for layer, window in zip(layers, kept, strict=True)]


def _nbytes(layers: tuple[Any, ...]) -> int:
    found = tree_leaves([vars(layer) for layer in layers])
    return sum(leaf.nbytes for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _decoder_blocks(model: Any, layers: int) -> list[str]:
    """Return the blocks of a decoder with so many layers; of several stacks that have as many a decoder's, or the last.

    Layers that share the cache of others have none: a stack may have more blocks, and these are the last of them.
    """
    stacks: dict[str, dict[str, None]] = {}
    for name in model.state_dict():
        if block := block_of(name):
            stacks.setdefault(block.rpartition(".")[0], {})[block] = None
    enough = {stack: blocks for stack, blocks in stacks.items() if len(blocks) >= layers}
    same = {stack: blocks for stack, blocks in enough.items() if len(blocks) == layers}
    fitting = list(same or enough)
    chosen = ([stack for stack in fitting if "decoder" in stack] or fitting)[-1:]
    return [block for stack in chosen for block in stacks[stack]]


def activation_bytes(model: Any | None, parts: list[Part], context: int, batch: int) -> int:
    """Return an estimate of what a GPU needs for the activations of a layer, with the whole context in one pass."""
    width = max((part.width for part in parts if part.kind != "head"), default=0)
    nbytes = _COPIES * HALF * batch * context * width
    if model is None:
        return nbytes
    config = model.config.get_text_config()
    biased = _BIAS_BYTES if hasattr(config, "relative_attention_num_buckets") else 0
    score = biased if model._supports_sdpa else _SCORE_BYTES
    return nbytes + batch * getattr(config, "num_attention_heads", 0) * context * context * score


def most_tokens(model: Any | None) -> int | None:
    """Return the longest text that the model allows; None where nothing says it."""
    return None if model is None else longest_text(model.config, model)
