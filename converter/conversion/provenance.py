"""What a conversion writes about itself: config.json, its quantization, and where the source came from."""

import hashlib
from collections import Counter
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmint8.formats import DTYPES, NATIVE, Quantization

from ..hub.origin import is_repo_id
from ..planning.plan import ConversionPlan


def output_config(plan: ConversionPlan) -> dict[str, Any]:
    """Return the source's config without paths, with the class that its tensors fill.

    Its dtype is replaced by a cast's, and for a quantized head it is untied.
    """
    config: dict[str, Any] = _without_paths(plan.source.config)
    config.pop("transformers_weights", None)  # it names a file of the source
    if plan.config is not None:
        config["architectures"] = list(plan.config.architectures)
    if plan.dtype:
        name = str(DTYPES[plan.dtype]).removeprefix("torch.")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    if plan.untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def _without_paths(value: Any) -> Any:
    """Leave out where a model, or a part of it, lay when it was saved: the name of a user may be in it."""
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_paths(item)
        for key, item in value.items()
        if key != "_name_or_path" or not isinstance(item, str) or not item or is_repo_id(item)
    }


def describe(plan: ConversionPlan, outliers: dict[str, int], calibration: dict[str, Any] | None) -> Quantization:
    """Return what config.json says about the quantization."""
    coded = {name: plan.scheme_of(layer) for name, layer in plan.selection.layers.items()}
    widths = {}
    for name, layer in plan.selection.layers.items():
        kbit = coded[name].kbit
        if kbit and kbit.most_features(kbit.row_bytes(layer.in_features)) != layer.in_features:
            widths[name] = layer.in_features
    common = Counter(one for one in coded.values() if one.lookup is None).most_common(1)
    scheme = common[0][0] if plan.kbits and common else plan.options.scheme
    return Quantization(
        plan.selection.skip_modules,
        {name: outliers.get(name, 0) for name in plan.selection.layers},
        criterion=str(plan.criterion),
        schemes={scheme.name: scheme} | {other.name: other for other in coded.values()},
        layers={name: one.name for name, one in coded.items()} if plan.options.layout == NATIVE else {},
        in_features=widths,
        rounding=plan.options.rounding,
        layout=plan.options.layout,
        producer=f"llmint8 {_version('llmint8')}",
        source=_origin(plan),
        calibration=calibration,
    )


def identify(plan: ConversionPlan) -> dict[str, Any]:
    """Identify the source in the manifest: its origin, the sizes of its files, the hash of its config; and options."""
    config = (plan.source.beside / "config.json").read_bytes()
    return {
        **_origin(plan),
        **({"quantized": plan.source.quantized} if plan.source.quantized else {}),
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": {path.name: size for path, size in plan.source.stored.items()},
        "options": _options(plan),
    }


def _options(plan: ConversionPlan) -> dict[str, str]:
    """Return every option that decides what a conversion writes: by these a finished one is recognised."""
    left_out = {"jobs", *(("format", "rotate", "rounding") if plan.options.format == 1 else ())}  # it has them not
    left_out |= set() if plan.options.kbit else {"bits", "data_type", "block_size"}
    left_out |= set() if plan.options.target_size else {"target_size"}
    left_out |= set() if plan.options.quantize_embeddings else {"quantize_embeddings"}  # as before there was one
    values = {field.name: getattr(plan.options, field.name) for field in fields(plan.options)}
    if kbit := plan.options.kbit:
        values |= {} if plan.options.target_size else {"bits": kbit.bits}
        values |= {"data_type": kbit.data_type, "block_size": kbit.block or "row"}
    values = {name: value for name, value in values.items() if name not in left_out}
    values["calibration"] = _calibration(plan)
    lists = {name: ", ".join(map(repr, value)) for name, value in values.items() if isinstance(value, list | tuple)}
    return {f"--{name.replace('_', '-')}": str(value) for name, value in (values | lists).items()}


def fingerprint(plan: ConversionPlan) -> dict[str, str]:
    """Return what the work of a conversion depends on, in words: with the same fingerprint it can be used again."""
    source = plan.source
    found = {"the source": plan.origin.name, "its commit": str(plan.origin.commit), **plan.options.spelled()}
    found["the calibration"] = _calibration(plan)
    for file in [source.beside / "config.json", *source.small_files]:
        found[f"the source's {file.relative_to(source.beside)}"] = _short_hash(file)
    for weights, nbytes in source.stored.items():
        # Of a commit the files are always the same, and may be fetched anew.
        time = None if plan.origin.commit else datetime.fromtimestamp(weights.stat().st_mtime, UTC)
        modified = f", modified {time.isoformat()}" if time else ""
        found[f"the source's {weights.name}"] = f"{nbytes} bytes{modified}"
    return found | {name: _version(name) for name in ("llmint8", "torch", "transformers")}


def _calibration(plan: ConversionPlan) -> str:
    if plan.samples is not None:
        return plan.samples.sha256[:16]
    text = plan.options.calibration
    return "the packaged text" if text is None else _short_hash(Path(text))


def _short_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _origin(plan: ConversionPlan) -> dict[str, Any]:
    return {"name": plan.origin.name, "repo": plan.origin.repo, "commit": plan.origin.commit}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
