"""Models of a family on one text: every run that is wanted and not done yet, one model after the other.

What can be checked before the first run is checked for all models: files, tokenizers, the text, and that they are a
family, which is that their tokenizers cut the text alike. Otherwise perplexities could not be compared.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmint8.converter.calibration.text import load_calibration, read_text
from llmint8.converter.gguf.source import open_local
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.machine import usable_device
from llmint8.converter.model.build import meta_model
from llmint8.converter.model.experts import in_order
from llmint8.converter.planning.options import Options
from llmint8.converter.planning.plan import ConversionPlan, plan_source
from llmint8.formats import LLMInt8Error, SourceError
from llmint8.formats.disk.names import CONFIG_NAME

from ..accuracy.evaluate import Measurement, token_windows
from ..accuracy.reference import check_window, reference_class, tokenizer_beside
from .layers import before
from .runs import Measured, Run, RunFile
from .schemes import BASE, Layer, Scheme, Shapes
from .simulation import Simulation

# Experts are layers only there.
_NATIVE = Options(format=2, outliers="none")
# A weight stands for so many bytes of what progress counts: it is read as 16 bit.
_WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Member:
    """A model of the family, with what is known of it before it runs."""

    plan: ConversionPlan
    windows: Tensor
    calibration: Tensor  # windows of the text in the package, for GPTQ
    shapes: Shapes
    measured: Measured

    def run(self, scheme: Scheme, found: Measurement) -> Run:
        """Put together what was measured."""
        return Run(
            self.measured,
            scheme,
            self.shapes.weights,
            self.shapes.weight_bits(scheme),
            self.shapes.total_bits(scheme),
            found.perplexity,
            found.kl_mean,
            found.kl_median,
            found.kl_p99,
            found.top1_agreement,
        )


def open_family(sources: Sequence[str | Path], text: Path, tokens: int, window: int) -> list[Member]:
    """Open the models, check that they are a family, and hash what they are made of.

    Args:
        sources: 16-bit checkpoints of causal language models, directories or Hub ids.
        text: a `.jsonl` file with a `text` field in each line, or any text file.
        tokens: so many from the beginning of the text, cut to whole windows.
        window: tokens in a forward pass.

    Raises:
        ValueError: too short a text, or a window longer than a model takes.
        LLMInt8Error: one is no checkpoint of a causal language model with layers to quantize, or they are no family.

    """
    content = read_text(text)
    opened = [_opened(source, content, tokens, window) for source in sources]
    for plan, windows in opened[1:]:
        if not torch.equal(windows, opened[0][1]):
            raise SourceError(
                f"{plan.source.path}: its tokenizer cuts the text in another way than that of "
                f"{opened[0][0].source.path}, so their perplexities cannot be compared; run them one by one"
            )
    names = [plan.origin.name for plan, _ in opened]
    members = []
    for source, (plan, windows) in zip(sources, opened, strict=True):
        name = plan.origin.name if names.count(plan.origin.name) == 1 else str(source)
        read = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        measured = Measured(name, _source_hash(plan), text.name, read, windows.numel(), window)
        members.append(Member(plan, windows, _calibration(plan, window), _shapes(plan), measured))
    return members


def _opened(source: str | Path, content: str, tokens: int, window: int) -> tuple[ConversionPlan, Tensor]:
    origin = resolve(source, kind="source")
    opened = open_local(origin.path)
    config, cls = reference_class(opened)
    if config.is_encoder_decoder or not cls.can_generate():
        raise LLMInt8Error(f"{opened.path}: {cls.__name__} is no causal language model, and only these have perplexity")
    check_window(window, config, opened.path)
    windows = token_windows(tokenizer_beside(opened.beside, origin.path), content, tokens, window)
    return plan_source(opened, origin, opened.path, _NATIVE), windows


def _calibration(plan: ConversionPlan, window: int) -> Tensor:
    """Return windows of the text that a conversion calibrates with, as many tokens, and one window at least."""
    count = max(_NATIVE.calibration_tokens, window)
    tokens = load_calibration(plan.source.beside, plan.config, None, count).tokens.flatten()
    windows = max(1, len(tokens) // window)
    return tokens.repeat(-(-windows * window // len(tokens)))[: windows * window].reshape(windows, window)


def _shapes(plan: ConversionPlan) -> Shapes:
    model = meta_model(plan.config)
    modules = {plan.selection.module_of[name]: layer for name, layer in plan.selection.layers.items()}
    follows = before(plan, in_order(model, modules, plan.selection.experts.values()))
    layers = [Layer(one.out_features, one.in_features, name in follows) for name, one in modules.items()]
    weights = {layer.weight.name for layer in plan.selection.layers.values()}
    others = sum(torch.Size(info.shape).numel() for name, info in plan.source.tensors.items() if name not in weights)
    return Shapes(layers, others)


def _source_hash(plan: ConversionPlan) -> str:
    found = hashlib.sha256((plan.source.beside / CONFIG_NAME).read_bytes())
    for path in sorted(plan.source.stored):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


@dataclass(frozen=True)
class Work:
    """What is left to do for a model."""

    member: Member
    schemes: Sequence[Scheme]

    @property
    def nbytes(self) -> int:
        """The bytes that all layers multiply; the model in 16 bit runs in any case, to compare the others with it."""
        return _WEIGHT_BYTES * self.member.shapes.weights * len({*self.schemes, BASE})


def left_to_do(members: Sequence[Member], schemes: Sequence[Scheme], file: RunFile) -> list[Work]:
    """Return what is not in the file."""
    left = [Work(one, [scheme for scheme in schemes if not file.has(one.measured, scheme)]) for one in members]
    return [work for work in left if work.schemes]


def measure_family(work: Sequence[Work], file: RunFile, device: str, progress: Callable[[str, int], None]) -> None:
    """Measure what is left to do; each run is written into the file when it is done.

    Args:
        work: see `left_to_do`.
        file: of the runs.
        device: where the models run.
        progress: called with each layer that was multiplied, and the bytes of its weight.

    Raises:
        ValueError: no such device.
        LLMInt8Error: a model cannot be run, or the file not be written.

    """
    where = usable_device(device)
    for one in work:
        _measure(one.member, one.schemes, file, where, progress)


def _measure(
    member: Member, schemes: Sequence[Scheme], file: RunFile, device: torch.device, progress: Callable[[str, int], None]
) -> None:
    def passed(layer: str, weights: int) -> None:
        progress(f"{member.measured.model}: {layer}", _WEIGHT_BYTES * weights)

    simulation = Simulation(member.plan, member.windows, member.calibration, device, passed)
    simulation.measure(schemes, lambda found: file.add(member.run(scheme, one) for scheme, one in found.items()))
