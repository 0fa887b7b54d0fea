"""Images and sounds as the source's own processor makes them for the model.

Images are read by Pillow, which transformers' processors need anyway; sounds that are PCM in a `.wav` file by the
standard library, others by soundfile where it is installed. A sound is brought to the processor's sampling rate, its
channels to one, and of a long one the beginning is taken.
"""

import importlib.util
import inspect
import logging
import re
import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import SourceError, read_json

from ..model.build import quiet_transformers
from ..model.config import is_trusted, own_code
from ..model.inputs import LARGEST_EDGE, Given, senses
from ..model.made_up import image_channels
from ..planning.samples import Samples
from ..words import count, first_line

_PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")
# What a processor's config has numbers of that decide how large a tensor becomes, and the largest of them.
_SIZES = ("chunk_length", "crop_size", "feature_size", "nb_max_frames", "pad_size", "size")
_LARGEST = 4096
# Pillow goes by what is in a file, and would run Ghostscript for some.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_INSTALL = re.compile(r"pip install [\w\[\]-]+")
_MISSING = re.compile(r"Missing optional dependencies: ([\w-]+)")
_USUAL_RATE = 16_000
_PCM = "a .wav file of PCM"
# Of a sound: Whisper takes so many, and others what their memory allows.
_SECONDS, _SECONDS_OF_SAMPLES = 30, 10


def load_samples(source: Path, config: Any, samples: Samples) -> dict[str, Given]:
    """Return the images and sounds by the name of the model's argument for them.

    Raises:
        SourceError: a file cannot be read, there is no processor beside the source, or it or a file needs a library
            that is missing.

    """
    found = {}
    for kind, files in samples.files.items():
        names = senses(config)[kind]
        if kind == "image" and importlib.util.find_spec("PIL") is None:
            raise SourceError(f"{files[0]}: reading images needs the package Pillow: pip install pillow")
        processor = _processor(source, kind, is_trusted(config))
        if kind == "image":
            mode = "L" if image_channels(config) == 1 else "RGB"
            inputs = _processed(source, processor, [_image(file, mode) for file in files], {})
        else:
            rate = getattr(processor, "sampling_rate", None) or _USUAL_RATE
            seconds = _SECONDS_OF_SAMPLES if "input_values" in names else _SECONDS
            sounds = [_sound(file, rate, seconds).numpy() for file in files]
            inputs = _processed(source, processor, sounds, {"sampling_rate": rate, **_padding(processor)})
        name = next((name for name in names if name in inputs), None)
        if name is None:
            raise SourceError(
                f"{source}: its processor of {kind}s makes {', '.join(inputs) or 'no tensors'}, where the model takes "
                f"{' or '.join(names)}"
            )
        found[name] = Given(f"{count(len(files), kind)} of {samples.name}", len(files), inputs)
    return found


def _processor(source: Path, kind: str, trusted: bool) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    what = f"processor of {kind}s"
    if not any((source / name).is_file() for name in _PROCESSOR_NAMES):
        raise SourceError(
            f"{source}: no {what} ({' or '.join(_PROCESSOR_NAMES)}) beside the weights; put that of the model there, "
            "or leave --calibration out"
        )
    for name in _PROCESSOR_NAMES:
        if (source / name).exists():
            _check_processor(source / name, read_json(source / name), trusted)
    auto = AutoImageProcessor if kind == "image" else AutoFeatureExtractor
    try:
        with quiet_transformers(logging.ERROR):
            return auto.from_pretrained(source, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # whatever it likes when a file or a library is missing
        raise SourceError(f"{source}: its {what} cannot be loaded ({_reason(error)})") from None


def _check_processor(file: Path, config: dict[str, Any], trusted: bool) -> None:
    """Look at a processor's config before its code does, and at those inside of it.

    Raises:
        SourceError: it names code that does not lie beside it, or a size that would fill the memory.

    """
    if trusted:
        own_code(config, file)
    for key, value in config.items():
        large = [one for one in _numbers(value) if one > _LARGEST] if key in _SIZES else []
        if large:
            raise SourceError(f"{file}: {key} is {large[0]}, at most {_LARGEST} are allowed")
        if isinstance(value, dict) and key.endswith(("processor", "extractor")):
            _check_processor(file, value, trusted)


def _numbers(value: Any) -> list[float]:
    """Return the numbers of a size, which is one, a list, or an object."""
    if isinstance(value, dict):
        # What lies below a bound needs no other: some have a number of pixels there.
        value = [one for name, one in value.items() if name != "longest_edge"]
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, (int, float))]


def _processed(source: Path, processor: Any, values: list[Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that a processor makes, floats as float32."""
    try:
        with quiet_transformers(logging.ERROR):
            inputs = processor(values, return_tensors="pt", **options)
    except Exception as error:  # its code may raise anything
        raise SourceError(f"{source}: its {type(processor).__name__} failed ({_reason(error)})") from None
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _padding(processor: Any) -> dict[str, bool]:
    """Ask for sounds of one length where a processor does not make them so by itself."""
    parameter = inspect.signature(type(processor).__call__).parameters.get("padding")
    return {"padding": True} if parameter is not None and parameter.default is False else {}


def _reason(error: Exception) -> str:
    """Return what went wrong in one line; of a library that is missing, what installs it."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code of its own; --trust-remote-code runs it"
    if install := _INSTALL.search(text):
        return f"it needs a library that is missing: {install[0]}"
    if missing := _MISSING.search(text):
        return f"it needs a library that is missing: pip install {missing[1]}"
    return first_line(error)


def _image(file: Path, mode: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            deep = image.mode.startswith(("I", "F"))
            image.draft(mode, (LARGEST_EDGE, LARGEST_EDGE))
            image.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
            found = image.convert(mode)
    except Exception as error:  # its readers of formats raise whatever they like
        raise SourceError(f"{file}: is no image that Pillow can read: {first_line(error)}") from None
    if deep:
        raise SourceError(f"{file}: has more than 8 bits for a color; save it with 8")
    return found


def _sound(file: Path, rate: int, seconds: int) -> Tensor:
    """Return the beginning of a sound at a sampling rate, its channels in one, float32 [samples], within -1 to 1."""
    sound, own_rate = _samples(file, seconds)
    if not len(sound):
        raise SourceError(f"{file}: holds no sound")
    sound = sound.mean(1)
    if own_rate != rate:
        # What the lower of the rates cannot hold is cut off from the spectrum.
        length = max(1, round(len(sound) * rate / own_rate))
        sound = torch.fft.irfft(torch.fft.rfft(sound), n=length) * (length / len(sound))
    return sound.float()


def _samples(file: Path, seconds: int) -> tuple[Tensor, int]:
    """Return the samples of a sound, float64 [samples, channels], and their rate."""
    why = f"not {_PCM}"
    if file.suffix.lower() == ".wav":
        try:
            return _pcm(file, seconds)
        except OSError as error:
            raise SourceError(f"{file}: cannot be read: {error.strerror}") from None
        except (wave.Error, EOFError) as error:  # compressed, of floats, or no sound at all
            why = f"not {_PCM}: {first_line(error)}"
    if importlib.util.find_spec("soundfile") is None:
        raise SourceError(f"{file}: reading it needs the package soundfile ({why}): pip install soundfile")
    try:
        import soundfile

        with soundfile.SoundFile(file) as sound:
            values = sound.read(seconds * sound.samplerate, dtype="float64", always_2d=True)
            return torch.from_numpy(values), sound.samplerate
    except Exception as error:  # it has errors of its own
        raise SourceError(f"{file}: is no sound that soundfile can read: {first_line(error)}") from None


def _pcm(file: Path, seconds: int) -> tuple[Tensor, int]:
    with wave.open(str(file)) as sound:
        width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
        frames = bytearray(sound.readframes(seconds * rate))
    step = width * channels
    whole = len(frames) // step * step  # of a file that was cut off, the last may be half there
    if not whole:
        return torch.empty(0, channels, dtype=torch.float64), rate
    data = torch.frombuffer(frames, dtype=torch.uint8, count=whole).reshape(-1, channels, width)
    values = (data * 256.0 ** torch.arange(width, dtype=torch.float64)).sum(-1)  # the lowest byte comes first
    half = 256.0**width / 2
    values = values - half if width == 1 else values.where(values < half, values - 2 * half)  # one byte has no sign
    return values / half, rate
