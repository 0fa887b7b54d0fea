"""The names of a checkpoint's files, and of those that an unfinished conversion has."""

from pathlib import Path

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
# Weights of a source, in the order of transformers' `_get_resolved_checkpoint_files`.
WEIGHT_NAMES = (SAFETENSORS_NAME, SAFETENSORS_INDEX_NAME, TORCH_NAME, TORCH_INDEX_NAME)
MANIFEST_NAME = "llmint8_manifest.json"
CARD_NAME = "README.md"
# Of PEFT.
ADAPTER_CONFIG_NAME = "adapter_config.json"
# Where some checkpoints of 2023 keep what belongs in config.json.
LEGACY_QUANTIZATION_NAME = "quantization_config.json"
# What an unfinished conversion has done.
JOURNAL_NAME = "conversion.partial"
# Where the converter may keep what it has fetched of the source.
WORKING_NAME = "source.partial"


def is_unfinished(out: Path) -> bool:
    """Tell whether a directory holds a conversion that was interrupted, or is under way."""
    return (out / JOURNAL_NAME).is_file()
