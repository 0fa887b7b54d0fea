"""What was selected to be quantized: the layers, and what is known of those that are left alone."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llmint8.formats import Source, TensorInfo
from llmint8.formats.int8.schemes import Lookup

from ..endings import Endings
from ..model.experts import ExpertMatrix

# An output is put aside when it takes at most this part of its weight.
_OUTPUT_SHARE = 4


@dataclass(frozen=True)
class SelectedLayer:
    """A layer to quantize. `name` is its module's name in the source's tensor names."""

    name: str
    weight: TensorInfo
    transposed: bool  # stored [in, out], as GPT-2's Conv1D is
    tied: bool = False  # the head of a model whose embedding is this tensor too, and stays beside it
    lookup: Lookup | None = None  # it is the embedding, and `too` the head of which it is the weight

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[0 if self.transposed else 1]

    def read_rows(self, source: Source) -> Iterator[Tensor]:
        """Yield the weight in blocks of its rows, [n, K]; all at once where it is stored transposed."""
        name = self.weight.name
        return iter([source.read(name).t()]) if self.transposed else source.read_rows(name)


def kept_output_bytes(layer: SelectedLayer, tokens: int) -> int:
    """Return the bytes of a layer's output in the calibrated pass, where it is put aside; else 0.

    With it a pass that goes on after an interruption needs neither to read the weight again nor to multiply by it.
    """
    nbytes = 4 * tokens * layer.out_features
    return nbytes if _OUTPUT_SHARE * nbytes <= layer.weight.nbytes else 0


@dataclass(frozen=True)
class Selection:
    """The layers to quantize by name, those left alone with the reason, and what to tell the user.

    `module_of` has the module name in the model for all of them. It differs from the name in the checkpoint where
    transformers renames tensors when it loads them. A model without a head has them without `prefix`; `elsewhere` are
    linear modules that only other classes of the model's type have.
    """

    layers: dict[str, SelectedLayer]
    kept: dict[str, str]
    module_of: dict[str, str]
    notices: list[str]
    prefix: str = ""
    elsewhere: Sequence[str] = ()
    experts: dict[str, ExpertMatrix] = field(default_factory=dict)  # those of the layers that are one of them

    @property
    def layer_of(self) -> dict[str, SelectedLayer]:
        """The layers to quantize by the tensor names of their weights."""
        return {layer.weight.name: layer for layer in self.layers.values()}

    @property
    def multiplied(self) -> dict[str, SelectedLayer]:
        """The layers that are multiplied by, which an embedding alone is not."""
        return {name: layer for name, layer in self.layers.items() if layer.lookup != "only"}

    @property
    def skip_modules(self) -> list[str]:
        """The linear modules left alone, for bitsandbytes, which quantizes whatever it is not told to skip.

        Under their names in other classes of the model's type, too, but for those with which bitsandbytes would skip an
        int8 layer: it takes names that end like one of these for it.
        """
        own, int8 = {self.module_of[name] for name in self.kept}, Endings(self.module_of[name] for name in self.layers)
        others = {name.removeprefix(self.prefix) for name in own} | set(self.elsewhere)
        return sorted(own | {name for name in others if not int8.count(name)})

    @property
    def stacks(self) -> list[str]:
        """The tensors of the source of which layers are parts; they have to be split before these are read."""
        return list(dict.fromkeys(matrix.tensor for matrix in self.experts.values() if matrix.shared))

    def starved(self, reached: Collection[str]) -> list[str]:
        """Say how many matrices of experts are not among the layers that a calibration has reached."""
        count = len(self.experts.keys() - set(reached))
        what = (
            f"{count} of {len(self.experts)} matrices of experts were reached by no token of the calibration, and have"
        )
        return [f"{what} no outlier columns; with more --calibration-tokens they may be"] if count else []

    def without(self, reasons: dict[str, str]) -> "Selection":
        """Return the selection with more layers left alone, each for its reason."""
        kept = {**with_all_experts(self.experts, reasons), **reasons}
        layers = {name: layer for name, layer in self.layers.items() if name not in kept}
        experts = {name: matrix for name, matrix in self.experts.items() if name in layers}
        return dataclasses.replace(self, layers=layers, kept={**self.kept, **kept}, experts=experts)


def with_all_experts(experts: dict[str, ExpertMatrix], kept: Collection[str]) -> dict[str, str]:
    """Return why other matrices of experts stay, too, where some do: transformers loads all of a model in one way."""
    if not experts.keys() & set(kept):
        return {}
    return {name: "other experts are not in int8" for name in experts if name not in kept}
