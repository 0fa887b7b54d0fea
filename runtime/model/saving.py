"""`save_pretrained` of a loaded model, with the manifest that a checkpoint must have, and files named by its format.

transformers lets a quantizer have no word after the weights are written, and only then it is known which file has which
tensor. So `PreTrainedModel.save_pretrained` is wrapped, once; for other models it is what it was. An attribute of
the loaded model in its place would keep the model in memory, and be lost where it is pickled.
"""

import functools
import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmint8.formats import BITSANDBYTES, Layout, LLMInt8Error, Manifest
from llmint8.formats.disk.names import CONFIG_NAME
from llmint8.formats.writing.saved import write_manifest

from ..parallel.state import is_first, wait_for_all


def save_as_loaded(config_of: Callable[[Any], Any]) -> None:
    """Let `save_pretrained` write whole checkpoints of models for which `config_of` returns a `LoadedConfig`."""
    saved = PreTrainedModel.save_pretrained

    @functools.wraps(saved)
    def save_pretrained(self: Any, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        config = config_of(self)
        if config is None or (config.layout == BITSANDBYTES and not config.provenance):
            return saved(self, save_directory, *arguments, **options)  # type: ignore[no-any-return]
        if config.parallel is not None and not is_first():
            saved(self, save_directory, *arguments, **options)  # puts layers together, and writes nothing
            return wait_for_all()
        given = signature(saved).bind(self, save_directory, *arguments, **options).arguments
        if given.get("push_to_hub"):
            raise LLMInt8Error(f"{save_directory}: push_to_hub=True uploads no manifest; call model.push_to_hub(...)")
        path, layout = Path(save_directory), config.layout
        if layout == BITSANDBYTES:
            saved(self, save_directory, *arguments, **options)
        else:
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path, prefix=".saving-") as beside:
                saved(self, beside, *arguments, **options)
                _move(Path(beside), path, layout)
        written = any((path / name).exists() for name in (layout.single, layout.index))
        if given.get("is_main_process", True) and written and config.provenance:  # with peft it is an adapter
            files = (CONFIG_NAME, layout.index, "generation_config.json")
            write_manifest(path, **json.loads(config.provenance), files=files)
        if config.parallel is not None:
            wait_for_all()
        return None

    PreTrainedModel.save_pretrained = save_pretrained


def _move(saved: Path, out: Path, layout: Layout) -> None:
    """Move what transformers has saved to where it belongs, weight files under the names of their format.

    They have had other names nowhere where somebody looks who would take the int8 values for weights.
    """
    for old in (path for pattern in ("*.safetensors", "*.index.json") for path in out.glob(f"{layout.stem}{pattern}")):
        old.unlink()
    stem = BITSANDBYTES.stem
    index = saved / BITSANDBYTES.index
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        for name, file in content["weight_map"].items():
            content["weight_map"][name] = layout.stem + file.removeprefix(stem)
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in sorted(saved.iterdir(), key=lambda path: path.name == CONFIG_NAME):  # that last
        weights = path.name.startswith(stem) and path.suffix in (".safetensors", ".json")
        path.replace(out / (layout.stem + path.name.removeprefix(stem) if weights else path.name))


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


def names_once_saved(model: nn.Module, layers: dict[str, str]) -> dict[str, str]:
    """Return the name of each layer in the checkpoint -> its name in one that `save_pretrained` would write.

    They differ where transformers added a prefix on loading, as for `h.0.attn.c_attn` of old GPT-2 checkpoints.
    """
    numbers = {f"{name}.weight": torch.tensor(i) for i, name in enumerate(layers.values())}
    saved = {int(number): name for name, number in revert_weight_conversion(model, numbers).items()}
    return {name: saved[i].removesuffix(".weight") for i, name in enumerate(layers)}


def rename_layers(block: dict[str, Any], saved_names: dict[str, str]) -> None:
    """Keep what is said of each layer under the names that the saved tensors will have."""
    for holder, key in ((block.get("outliers"), "counts"), (block, "layers")):
        if holder and key in holder:
            holder[key] = {saved_names[name]: value for name, value in holder[key].items()}
