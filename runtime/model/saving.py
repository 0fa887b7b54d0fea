"""`save_pretrained` of a loaded model, with the manifest that a checkpoint must have.

transformers lets a quantizer have no word after the weights are written, and only then it is known which file has which
tensor. So `PreTrainedModel.save_pretrained` is wrapped, once; for other models it is what it was. An attribute of
the loaded model in its place would keep the model in memory, and be lost where it is pickled.
"""

import functools
import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmint8.formats import LLMInt8Error, Manifest
from llmint8.formats.disk.names import CONFIG_NAME, SAFETENSORS_INDEX_NAME, SAFETENSORS_NAME
from llmint8.formats.writing.saved import write_manifest

_FILES = (CONFIG_NAME, SAFETENSORS_INDEX_NAME, "generation_config.json")


def write_manifests(provenance: Callable[[Any], bytes | None]) -> None:
    """Let `save_pretrained` write the manifest of models for which `provenance` returns what `provenance_of` did."""
    saved = PreTrainedModel.save_pretrained

    @functools.wraps(saved)
    def save_pretrained(self: Any, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        known = provenance(self)
        if not known:
            return saved(self, save_directory, *arguments, **options)  # type: ignore[no-any-return]
        given = signature(saved).bind(self, save_directory, *arguments, **options).arguments
        if given.get("push_to_hub"):
            raise LLMInt8Error(f"{save_directory}: push_to_hub=True uploads no manifest; call model.push_to_hub(...)")
        saved(self, save_directory, *arguments, **options)
        path = Path(save_directory)
        written = any((path / name).exists() for name in (SAFETENSORS_NAME, SAFETENSORS_INDEX_NAME))
        if given.get("is_main_process", True) and written:  # with peft it is an adapter
            write_manifest(path, **json.loads(known), files=_FILES)

    PreTrainedModel.save_pretrained = save_pretrained


def provenance_of(manifest: Manifest, saved_names: dict[str, str]) -> bytes:
    """Return what a manifest says but for hashes, as JSON, small to keep; layers under the names they will be saved by.

    The converter's options are left out: a directory is recognised by them, and another program writes this one.
    """
    modules = {
        saved_names[name]: {
            key: saved_names.get(value, value) if key == "shares_input_with" else value
            for key, value in statistics.items()
        }
        for name, statistics in manifest.modules.items()
    }
    source = {key: value for key, value in manifest.source.items() if key != "options"}
    return json.dumps({"source": source, "modules": modules}).encode()
