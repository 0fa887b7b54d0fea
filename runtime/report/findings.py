"""What a report is about: everything found out about one checkpoint, its sizes among it."""

from dataclasses import dataclass

from llmint8.formats import Checkpoint

from .removal import Removal
from .statistics import LayerInput, Table4


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors, by what they are: of the checkpoint, and of its source by shapes and 16-bit dtype."""

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


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Add up the tensors; the source's layers are estimated from the shapes and the dtype of the outlier columns."""
    before = {"16-bit layers": 0, "everything else": 0}
    after = {"int8 weights": 0, "scales": 0, "16-bit columns": 0, "everything else": 0}
    kinds = {"SCB": "scales", "weight_format": "scales"}
    kinds |= {"outlier_dims": "16-bit columns", "outlier_weight": "16-bit columns"}
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
                before["16-bit layers"] += record.out_features * record.in_features * width
    return Sizes(before, after)
