"""What a conversion writes about itself: config.json, its quantization, and where the source came from."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llmint8.formats import DTYPES, Quantization

from .calibrate import ACTIVATION
from .plan import ConversionPlan


def output_config(plan: ConversionPlan) -> dict[str, Any]:
    """Return the source's config, its dtype replaced when tensors were cast, and untied when the head was quantized."""
    config = dict(plan.source.config)
    if plan.dtype:
        name = str(DTYPES[plan.dtype]).removeprefix("torch.")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    if plan.untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def describe(plan: ConversionPlan, outliers: dict[str, int], calibration: dict[str, Any] | None) -> Quantization:
    """Return what config.json says about the quantization."""
    return Quantization(
        plan.selection.skip_modules,
        {name: outliers.get(name, 0) for name in plan.selection.layers},
        criterion=str(plan.criterion),
        activation=ACTIVATION,
        producer=f"llmint8 {_version()}",
        source=_origin(plan),
        calibration=calibration,
    )


def identify(plan: ConversionPlan) -> dict[str, Any]:
    """Identify the source in the manifest: where it came from, the sizes of its files, the hash of its config."""
    config = (plan.source.path / "config.json").read_bytes()
    return {
        **_origin(plan),
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": {file.path.name: file.size for file in plan.source.files},
    }


def _origin(plan: ConversionPlan) -> dict[str, Any]:
    return {"name": plan.origin.name, "repo": plan.origin.repo, "commit": plan.origin.commit}


def _version() -> str:
    try:
        return version("llmint8")
    except PackageNotFoundError:
        return "unknown"
