"""What memory a conversion takes."""

from llmint8.formats import Source
from llmint8.formats.containers.tensors import BLOCK_BYTES

from .selected import Selection

# What a conversion holds beside its largest tensor: the interpreter's own growth, headers, blocks being quantized.
_BASE_MEMORY = 64 << 20
_ACTIVATION_COPIES = 8
_LOGIT_COPIES = 2


def peak_memory(source: Source, selection: Selection, threads: int, rows: int, head: bool) -> int:
    """Return an estimate in bytes, the Python process and its libraries not counted.

    Args:
        source: the opened source checkpoint.
        selection: the layers to quantize.
        threads: how many tensors are converted at a time.
        rows: of activations in the calibrated pass; 0 where there is none.
        head: whether the output head is among the layers.

    """
    layer_of = selection.layer_of
    whole = 0  # the largest tensor that is not handled in blocks of its rows
    for info in source.tensors.values():
        layer = layer_of.get(info.name)
        if (layer and layer.transposed) or not source.in_blocks(info.name):
            whole = max(whole, int(1.5 * info.nbytes))
    peak = threads * (whole + 6 * BLOCK_BYTES)
    if rows:
        # The weight in use, its int8 copy, the one that is read ahead; and the batch's activations in float32.
        layers = selection.multiplied.values()
        activations = _ACTIVATION_COPIES * max(layer.in_features for layer in layers)
        if head:
            activations += _LOGIT_COPIES * max(layer.out_features for layer in layers)
        largest = max(info.nbytes for info in source.tensors.values())
        peak = max(peak, int(2.5 * largest) + rows * 4 * activations)
    return peak + _BASE_MEMORY
