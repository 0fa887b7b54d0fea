"""Made-up images and sounds, as large as a model takes them.

They are noise with a few large shapes in it, of mean 0 and standard deviation 1, and the same in every run.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FRAMES = 256
_SAMPLES = 16_000  # of a sound: one second at the usual rate
_LARGE_IMAGE = 256  # from this edge on one image shows enough tokens


def make(config: Any, name: str, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield the arguments of a model for images or sounds, in each form in which it may take them.

    Args:
        config: the model's.
        name: what it calls its argument for them; the dict has it under the empty name.
        names: all of its arguments.
        count: how many images or sounds.

    """
    kinds = {"pixel_values": _images, "input_features": _spectrograms, "input_values": _sounds}
    return kinds.get(name, _patches)(config, names, count)


def image_channels(config: Any) -> int:
    """Return of how many colours the images are that a model takes."""
    return number(vision_of(config), 3, "num_channels", "in_channels", "in_chans")


def vision_of(config: Any) -> Any:
    """Return the part of a config that describes images."""
    return _part(config, "vision_config", "image_size", "image_config", "encoder", "backbone_config")


def audio_of(config: Any) -> Any:
    """Return the part of a config that describes sounds."""
    return _part(config, "audio_config", "num_mel_bins", "encoder")


def _part(config: Any, name: str, key: str, *others: str) -> Any:
    """Return the part of a config that describes images, or sounds; all of it where that has the key itself."""
    for attribute in (name, *others):
        part = getattr(config, attribute, None)
        if part is not None and not isinstance(part, str | int) and hasattr(part, "to_dict"):
            return part
    thinker = getattr(config, "thinker_config", None)
    return config if thinker is None or hasattr(config, key) else _part(thinker, name, key, *others)


def number(config: Any, default: int, *names: str) -> int:
    """Return the first of these settings that a config has, of a list its first number."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return default


def _images(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    vision, channels = vision_of(config), image_channels(config)
    patch = number(vision, 16, "patch_size", "spatial_patch_size")
    if "image_grid_thw" in names:  # Qwen2-VL and its kind: a list of patches, so many in each direction
        rows, values = 16, channels * number(vision, 2, "temporal_patch_size") * patch**2
        grid = torch.tensor([[1, rows, rows]])
        yield {"": _noise(rows**2, values), "image_grid_thw": grid}
        return
    if "spatial_shapes" in names:  # SigLIP2: patches up to a number of them, and which of them there are
        rows = math.isqrt(number(vision, 256, "num_patches"))
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
    values = _noise(count, edge**2, number(vision, 3, "num_channels") * number(vision, 16, "patch_size") ** 2)
    yield {"": torch.cat([places, values], -1), "attention_mask": torch.ones(count, edge**2)}


def _spectrograms(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    audio = audio_of(config)
    bins = number(audio, 80, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "mel_bins")
    frames = 2 * number(audio, FRAMES // 2, "max_source_positions")  # Whisper takes no other number
    masks: list[str] = [name for name in ("input_features_mask", "feature_attention_mask") if name in names]
    mask = {name: torch.ones(count, frames, dtype=torch.int64) for name in masks}
    yield {"": _noise(count, bins, frames), **mask}
    yield {"": _noise(count, FRAMES, bins)}
    size = number(audio, FRAMES, "spec_size")
    yield {"": _noise(count, 1, size * (size // bins), bins)}


def _sounds(config: Any, names: set[str], count: int) -> Iterator[dict[str, Tensor]]:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if bins and length:  # the spectrogram transformer calls its pictures of sound so
        yield {"": _noise(count, length, bins)}
    yield {"": _noise(count, 1, _SAMPLES)[:, 0]}


def _noise(*shape: int) -> Tensor:
    """Return noise with a few large shapes in its last two dimensions, float32, mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape[-2:]
    coarse = torch.randn(1, math.prod(shape[:-2]), min(8, height), min(8, width), generator=generator)
    shapes = functional.interpolate(coarse, size=(height, width), mode="bilinear")
    values = shapes.reshape(shape) + torch.randn(shape, generator=generator) / 2
    return (values - values.mean()) / values.std()
