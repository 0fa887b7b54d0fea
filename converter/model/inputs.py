"""What a model can be given to see its layers at work: token ids, and images and sounds, of the user's or made up.

`main_input_name` and the signatures of its methods say what a model takes, its config how large that is. What a model
takes beside images or sounds is given where it is known how it must look; of models that take something else nothing is
run.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import model_class
from .made_up import FRAMES, audio_of, make, number, vision_of

# What models call their arguments for what is not text.
_IMAGES, _SOUNDS = ("pixel_values", "flattened_patches"), ("input_features", "input_values")
_SENSES = (*_IMAGES, *_SOUNDS)
# A photo's longer edge is no longer than that when it is decoded: no processor makes it larger, and all are held.
LARGEST_EDGE = 1024
_FRAMES_OF_SAMPLES = 500  # that models make of the samples of ten seconds


class Given(NamedTuple):
    """Images or sounds that a user has: what they are, how many, and the arguments with which a model takes them."""

    what: str
    number: int
    arguments: dict[str, Tensor]


class Run(NamedTuple):
    """One call of a model: what it is shown, the method's name, and its arguments.

    It is needless when a run with the same `what` came to its end.
    """

    what: str
    method: str
    arguments: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """How many tokens of text it shows; encoder and decoder get the same ones."""
        return max((ids.numel() for name, ids in self.arguments.items() if name.endswith("input_ids")), default=0)


def takes_text(config: Any) -> bool:
    """Tell whether the model of a config takes token ids."""
    cls = model_class(config)
    return cls is not None and not _names(cls.forward).isdisjoint(("input_ids", "decoder_input_ids"))


def senses(config: Any) -> dict[str, list[str]]:
    """Return the kinds of things beside text that the model of a config takes, and what it calls them."""
    cls = model_class(config)
    names = set() if cls is None else _names(cls.forward)
    kinds = {"image": _IMAGES, "sound": _SOUNDS}
    return {kind: found for kind, all_names in kinds.items() if (found := [one for one in all_names if one in names])}


def rows_of_one(config: Any) -> int:
    """Return about how many rows of activations an image or a sound gives a layer; 0 where the model takes neither."""
    taken, rows = senses(config), 0
    if "image" in taken:
        # Of models that say no size, which take images as they are.
        edge = number(vision_of(config), LARGEST_EDGE, "image_size")
        rows = (edge // number(vision_of(config), 16, "patch_size", "spatial_patch_size")) ** 2 + 1
    if "sound" in taken:
        frames = _FRAMES_OF_SAMPLES if "input_values" in taken["sound"] else FRAMES
        rows = max(rows, number(audio_of(config), frames, "max_source_positions"))
    return rows


def special_ids(config: Any) -> set[int]:
    """Return the token ids that a config gives a meaning: padding, places of images, beginnings and ends."""
    values: set[int] = set()
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_index", "token_ids")):
                values |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return values


def runs(model: Any, tokens: Tensor, given: Mapping[str, Given] | None = None) -> Iterator[Run]:
    """Yield the calls that show a model's layers at work, those of its main input first.

    Args:
        model: a transformers model, on any device.
        tokens: token ids [rows, length] on the device of the runs; they are left out where the model takes none.
        given: images or sounds by the name of the model's argument; those of other arguments are made up.

    """
    given = given or {}
    text = text_inputs(model, tokens)
    mains = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    names = _names(model.forward)
    found = [name for name in _SENSES if name in names]
    main = next((name for name in mains if name in found), None)
    if main is None and text:
        yield Run("text", "forward", text)
        yield Run("text", "forward", text_inputs(model, _shorter(tokens)))
    for name in [main] if main else []:
        for what, shown, few in _beside_text(model, name, names, text, tokens, given):
            yield Run(what, "forward", {**shown, **few})
            if "input_ids" in few:
                yield Run(what, "forward", shown)
    yield from _features(model, tokens, given)
    for name in found if main is None and text else []:
        for what, shown, few in _beside_text(model, name, names, text, tokens, given):
            yield Run(what, "forward", {**shown, **few})


def _beside_text(
    model: Any, name: str, names: set[str], text: dict[str, Tensor], tokens: Tensor, given: Mapping[str, Given]
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Yield images or sounds and the text to go with them: in one call they belong together, as many rows of each."""
    count = given[name].number if name in given else len(tokens[:2])
    few = {key: _in_rows(value, count) for key, value in text.items()}
    for what, shown in _shown(model, name, names, count, tokens.device, given):
        yield what, shown, few


def _features(model: Any, tokens: Tensor, given: Mapping[str, Given]) -> Iterator[Run]:
    """Yield calls of the methods that models of several kinds of input have for each of them."""
    for sense, argument in (("text", "input_ids"), ("image", "pixel_values"), ("audio", "input_features")):
        method = f"get_{sense}_features"
        names = _names(getattr(model, method, None))
        if argument not in names:
            continue
        if sense == "text":
            yield Run("text", method, {argument: tokens})
            continue
        for what, shown in _shown(model, argument, names, 2, tokens.device, given):
            yield Run(what, method, shown)


def text_inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the arguments with which a model takes token ids [rows, length]; decoders get the same ones."""
    names = _names(model.forward)
    anything = not names or "kwargs" in names
    found = {"input_ids": tokens} if "input_ids" in names or (anything and not names & {*_SENSES}) else {}
    if model.config.is_encoder_decoder and ("decoder_input_ids" in names or anything):
        found["decoder_input_ids"] = tokens
    if "global_attention_mask" in names:  # Longformer has layers of their own for what all tokens look at
        found["global_attention_mask"] = torch.zeros_like(tokens).index_fill(1, tokens.new_zeros(1), 1)
    return found


def _shorter(tokens: Tensor) -> Tensor:
    """Return token ids in twice as many rows of half the length, for models that take less than they say."""
    half = max(1, tokens.shape[1] // 2)
    return tokens[:, : 2 * half].reshape(-1, half)


def _in_rows(tokens: Tensor, count: int) -> Tensor:
    """Return token ids in so many rows: the first of those that there are, or shorter ones."""
    if len(tokens) >= count:
        return tokens[:count]
    flat = tokens.flatten().repeat(-(-count // tokens.numel()))
    return flat[: len(flat) // count * count].reshape(count, -1)


def _names(method: Callable[..., Any] | None) -> set[str]:
    try:
        return set(inspect.signature(method).parameters) if method is not None else set()
    except (TypeError, ValueError):  # of a callable in C
        return set()


def _shown(
    model: Any, name: str, names: Iterable[str], count: int, device: torch.device, given: Mapping[str, Given]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield images or sounds with what they are: those given, or made-up ones in each form that the model may take."""
    if name in given:
        arguments = given[name].arguments
        yield given[name].what, {key: arguments[key].to(device) for key in arguments if key == name or key in names}
        return
    for made in make(model.config, name, set(names), count):
        arguments = {key: value.to(device) for key, value in made.items()}
        yield f"made-up {name}", {name: arguments.pop(""), **arguments}
