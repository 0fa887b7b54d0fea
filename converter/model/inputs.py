"""What a model can be given to see its layers at work: token ids, and made-up images and sounds.

`main_input_name` and the signatures of its methods say what a model takes, its config how large that is. Pictures and
sounds are noise with a few large shapes in it, of mean 0 and standard deviation 1, and the same in every run. What a
model takes beside them is given where it is known how it must look; of models that take something else nothing is run.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .build import model_class

_SENSES = ("pixel_values", "input_features", "input_values", "flattened_patches")
_SAMPLES = 16_000  # of a sound: one second at the usual rate
_FRAMES = 256
_LARGE_IMAGE = 256  # from this edge on one image shows enough tokens
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_text_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_sequence_length",
)


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


def longest_text(config: Any, model: Any | None) -> int | None:
    """Return how many tokens a row may have, or None where nothing says it.

    Positions that begin behind the index of padding, as those of RoBERTa do, are fewer than the config says.
    """
    found = [n for key in _LENGTHS if isinstance(n := getattr(config.get_text_config(), key, None), int) and n > 0]
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "pos" in name.rpartition(".")[2]:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=None)


def made_up_rows(config: Any) -> int:
    """Return about how many rows of activations made-up images and sounds give a layer; 0 where none are made up."""
    cls = model_class(config)
    if cls is None or _names(cls.forward).isdisjoint(_SENSES):
        return 0
    vision = _part(config, "vision_config", "image_size", "image_config", "encoder", "backbone_config")
    edge, patch = _number(vision, 0, "image_size"), _number(vision, 16, "patch_size", "spatial_patch_size")
    audio = _part(config, "audio_config", "num_mel_bins", "encoder")
    return 2 * max((edge // patch) ** 2 + 1, _number(audio, _FRAMES, "max_source_positions"))


def special_ids(config: Any) -> set[int]:
    """Return the token ids that a config gives a meaning: padding, places of images, beginnings and ends."""
    values: set[int] = set()
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_index", "token_ids")):
                values |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return values


def runs(model: Any, tokens: Tensor) -> Iterator[Run]:
    """Yield the calls that show a model's layers at work, those of its main input first.

    Args:
        model: a transformers model, on any device.
        tokens: token ids [rows, length] on the device of the runs; they are left out where the model takes none.

    """
    text = text_inputs(model, tokens)
    mains = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    names = _names(model.forward)
    senses = [name for name in _SENSES if name in names]
    main = next((name for name in mains if name in senses), None)
    if main is None and text:
        yield Run("text", "forward", text)
        yield Run("text", "forward", text_inputs(model, _shorter(tokens)))
    # Texts and images of one call belong together: as many rows of each.
    few = {key: value[:2] for key, value in text.items()}
    for name in [main] if main else []:
        for made in _made_up(model, name, names, len(tokens[:2]), tokens.device):
            yield Run(f"made-up {name}", "forward", {**made, **few})
            if "input_ids" in few:
                yield Run(f"made-up {name}", "forward", made)
    yield from _features(model, tokens)
    for name in senses if main is None and text else []:
        for made in _made_up(model, name, names, len(tokens[:2]), tokens.device):
            yield Run(f"made-up {name}", "forward", {**made, **few})


def _features(model: Any, tokens: Tensor) -> Iterator[Run]:
    """Yield calls of the methods that models of several kinds of input have for each of them."""
    for sense, argument in (("text", "input_ids"), ("image", "pixel_values"), ("audio", "input_features")):
        method = f"get_{sense}_features"
        names = _names(getattr(model, method, None))
        if argument not in names:
            continue
        if sense == "text":
            yield Run("text", method, {argument: tokens})
            continue
        for made in _made_up(model, argument, names, 2, tokens.device):
            yield Run(f"made-up {argument}", method, made)


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


def _names(method: Callable[..., Any] | None) -> set[str]:
    try:
        return set(inspect.signature(method).parameters) if method is not None else set()
    except (TypeError, ValueError):  # of a callable in C
        return set()


def _made_up(
    model: Any, name: str, names: Iterable[str], count: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield arguments for images or sounds, made up, in each form in which this model may take them."""
    make = {"pixel_values": _images, "input_features": _spectrograms, "input_values": _sounds}.get(name, _patches)
    for made in make(model.config, set(names), count):
        arguments = {key: value.to(device) for key, value in made.items()}
        yield {name: arguments.pop(""), **arguments}


def _images(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    vision = _part(config, "vision_config", "image_size", "image_config", "encoder", "backbone_config")
    channels = _number(vision, 3, "num_channels", "in_channels", "in_chans")
    patch = _number(vision, 16, "patch_size", "spatial_patch_size")
    if "image_grid_thw" in names:  # Qwen2-VL and its kind: a list of patches, so many in each direction
        rows, values = 16, channels * _number(vision, 2, "temporal_patch_size") * patch**2
        grid = torch.tensor([[1, rows, rows]])
        yield {"": _noise(rows**2, values), "image_grid_thw": grid}
        return
    if "spatial_shapes" in names:  # SigLIP2: patches up to a number of them, and which of them there are
        rows = math.isqrt(_number(vision, 256, "num_patches"))
        mask = torch.ones(count, rows**2, dtype=torch.int64)
        shapes = torch.full((count, 2), rows)
        yield {"": _noise(count, rows**2, channels * patch**2), "spatial_shapes": shapes, "pixel_attention_mask": mask}
        return
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 14 * patch
    height, width = (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
    if "decoder_input_ids" not in names and "input_ids" not in names and max(height, width) > _LARGE_IMAGE:
        count = 1
    images = _noise(count, channels, height, width)
    yield {"": images}
    yield {"": images[:, None]}  # several images for each text
    yield {"": images[:, None], "image_sizes": torch.tensor([[height, width]] * count)}


def _patches(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield Pix2Struct's images: patches, each after its row and its column."""
    vision, edge = _part(config, "vision_config", "patch_size"), 16
    places = torch.cartesian_prod(torch.arange(1.0, edge + 1), torch.arange(1.0, edge + 1)).expand(count, -1, -1)
    values = _noise(count, edge**2, _number(vision, 3, "num_channels") * _number(vision, 16, "patch_size") ** 2)
    yield {"": torch.cat([places, values], -1), "attention_mask": torch.ones(count, edge**2)}


def _spectrograms(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    audio = _part(config, "audio_config", "num_mel_bins", "encoder")
    bins = _number(audio, 80, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "mel_bins")
    frames = 2 * _number(audio, _FRAMES // 2, "max_source_positions")  # Whisper takes no other number
    masks: list[str] = [name for name in ("input_features_mask", "feature_attention_mask") if name in names]
    mask = {name: torch.ones(count, frames, dtype=torch.int64) for name in masks}
    yield {"": _noise(count, bins, frames), **mask}
    yield {"": _noise(count, _FRAMES, bins)}
    size = _number(audio, _FRAMES, "spec_size")
    yield {"": _noise(count, 1, size * (size // bins), bins)}


def _sounds(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if bins and length:  # the spectrogram transformer calls its pictures of sound so
        yield {"": _noise(count, length, bins)}
    yield {"": _noise(count, 1, _SAMPLES)[:, 0]}


def _part(config: Any, name: str, key: str, *others: str) -> Any:
    """Return the part of a config that describes images, or sounds; all of it where that has the key itself."""
    for attribute in (name, *others):
        part = getattr(config, attribute, None)
        if part is not None and not isinstance(part, str | int) and hasattr(part, "to_dict"):
            return part
    thinker = getattr(config, "thinker_config", None)
    return config if thinker is None or hasattr(config, key) else _part(thinker, name, key, *others)


def _number(config: Any, default: int, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return default


def _noise(*shape: int) -> Tensor:
    """Return noise with a few large shapes in its last two dimensions, float32, mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape[-2:]
    coarse = torch.randn(1, math.prod(shape[:-2]), min(8, height), min(8, width), generator=generator)
    shapes = functional.interpolate(coarse, size=(height, width), mode="bilinear")
    values = shapes.reshape(shape) + torch.randn(shape, generator=generator) / 2
    return (values - values.mean()) / values.std()
