"""What a report is about: everything found out about one checkpoint, its sizes among it."""

from dataclasses import dataclass

from llmint8.converter.words import precision
from llmint8.formats import Checkpoint

from .removal import Removal
from .statistics import LayerInput, Table4


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors, by what they are: of the checkpoint, and of its source by shapes and dtype."""

    before: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True)
class Findings:
    """What is on the page. `not_run` says why the model did not run; then there is no `removal`."""

    name: str
    checkpoint: Checkpoint
    inputs: list[LayerInput]
    hidden: list[LayerInput]
    table: Table4
    sizes: Sizes
    removal: Removal | None
    not_run: str | None

    @property
    def precision(self) -> str:
        """What the columns are in that are not quantized: `16 bit`, or `float32`."""
        return column_precision(self.checkpoint)


def column_precision(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint's outlier columns are in: `16 bit`, or `float32`."""
    tensors = checkpoint.tensors.values()
    return precision(info.dtype for info in tensors if info.name.endswith(".outlier_weight"))


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Add up the tensors; the source's layers are estimated from the shapes and the dtype of the outlier columns."""
    before = {"layers in the source": 0, "everything else": 0}
    after = {"int8 weights": 0, "scales": 0, "outlier columns": 0, "everything else": 0}
    kinds = dict.fromkeys(checkpoint.layout.reserved_suffixes, "scales")
    kinds |= {"codebook": "scales", "outlier_dims": "outlier columns", "outlier_weight": "outlier columns"}
    for info in checkpoint.tensors.values():
        name, _, suffix = info.name.rpartition(".")
        record = checkpoint.records.get(name)
        if record is None or suffix == "bias":
            before["everything else"] += info.nbytes
            after["everything else"] += info.nbytes
        elif suffix == "weight":
            after["int8 weights"] += info.nbytes
        elif suffix in kinds:
            after[kinds[suffix]] += info.nbytes
            if suffix == "outlier_weight":
                width = 4 if info.dtype == "F32" else 2
                before["layers in the source"] += record.out_features * record.in_features * width
    return Sizes(before, after)
