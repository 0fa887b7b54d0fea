"""The command `llmint8 inspect`: it reads config.json and the headers of the weight files."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.terminal import printable_lines
from llmint8.converter.words import count, inputs_in_words, kbit_in_words, precision, size, sizes

from ..placement.blocks import block_of, natural

# What takes less than this part of all that is outside of the blocks is not named.
_NAMED_SHARE = 0.05


@click.command("inspect", cls=Command)
@click.argument("checkpoint")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, when CHECKPOINT is a Hub repo.")
@click.option("--all", "every", is_flag=True, help="List every layer, where repeated ones are summed up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(checkpoint: str, revision: str | None, every: bool, as_json: bool) -> None:
    """Show what is in an int8 checkpoint: layers, shapes, outliers, sizes, where it came from."""
    set_up_logging(False)
    from llmint8.converter.hub.resolve import resolve
    from llmint8.formats import open_checkpoint

    facts = _facts(open_checkpoint(resolve(checkpoint, revision, "int8").path))
    echo_result(json.dumps(facts, indent=2) if as_json else _text(facts, every))


def _facts(opened: Any) -> dict[str, Any]:
    from llmint8.kernels.cpu import native
    from llmint8.kernels.kbit import cpu as kbit_native

    quantization = opened.quantization
    taken: Counter[str] = Counter()
    for name, info in opened.tensors.items():
        taken[name.rpartition(".")[0] or name] += info.nbytes
    layers = [
        {
            "name": record.name,
            "out_features": record.out_features,
            "in_features": record.in_features,
            "outliers": record.outlier_count,
            "scheme": record.scheme.name,
            "bias": record.has_bias,
            "bytes": taken[record.name],
        }
        for record in sorted(opened.records.values(), key=lambda record: natural(record.name))
    ]
    int8 = sum(layer["bytes"] for layer in layers)
    columns = {info.dtype for name, info in opened.tensors.items() if name.endswith(".outlier_weight")}
    others: dict[str, int] = {}
    for name, info in opened.tensors.items():
        if name.rpartition(".")[0] not in opened.records:
            others[info.dtype] = others.get(info.dtype, 0) + info.nbytes
    blocks: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for name, nbytes in taken.items():
        if block := block_of(name):
            blocks[block] += nbytes
        else:
            outside[name] += nbytes
    return {
        "path": str(opened.path),
        "architectures": opened.config.get("architectures"),
        "format": f"llmint8 {quantization.format_version}" if quantization.llmint8 else "bitsandbytes",
        "producer": quantization.producer,
        "source": quantization.source,
        "criterion": quantization.criterion if quantization.llmint8 else None,
        "outlier_dtypes": sorted(columns),
        "schemes": {name: scheme.to_dict() for name, scheme in quantization.schemes.items()},
        "kbits": _kbits(opened),
        "rotation": quantization.scheme.rotation,
        "rounding": quantization.rounding,
        "activation": quantization.scheme.activation,
        "activation_group": quantization.scheme.activation_group,
        "threshold": quantization.threshold,
        "searches": quantization.layout.searches,
        "not_calibrated": _not_calibrated(opened),
        "runs_on": _runs_on(kbit_native if quantization.scheme.kbit else native),
        "files": opened.files,
        "bytes": taken.total(),
        "int8_layers_bytes": int8,
        "other_bytes_by_dtype": others,
        "block_bytes": {name: blocks[name] for name in sorted(blocks, key=natural)},
        "outside_bytes": dict(outside.most_common()),
        "not_quantized": quantization.skip_modules,
        "int8_head": quantization.int8_head,
        "int8_embeddings": [name for name, record in opened.records.items() if record.scheme.lookup is not None],
        "layers": layers,
    }


def _runs_on(compiled: Any) -> str:
    """Return what runs most layers on this CPU; `compiled` is the module of their compiled layer."""
    return compiled.kinds()[0] if compiled.kinds() else f"plain torch ({compiled.why_not()})"


def _kbits(opened: Any) -> dict[str, int]:
    """Return in words how weights of k bits are coded, and how many are so."""
    kbits = (record.scheme.kbit for record in opened.records.values())
    return dict(Counter(kbit_in_words(kbit.bits, kbit.data_type, kbit.block) for kbit in kbits if kbit is not None))


def _not_calibrated(opened: Any) -> int:
    """Return how many layers search their outliers when they run, as the calibration did not reach them."""
    from llmint8.formats import check_manifest
    from llmint8.runtime.model.calibration import missed_layers

    manifest = check_manifest(opened)[0]
    return len(missed_layers(opened, manifest)) if manifest and opened.quantization.threshold else 0


def _text(facts: dict[str, Any], every: bool) -> str:
    source = facts["source"]
    origin = (source.get("name") or "unknown") + (f" at commit {source['commit']}" if source.get("commit") else "")
    others = ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in facts["other_bytes_by_dtype"].items())
    columns = sum(layer["outliers"] or 0 for layer in facts["layers"])
    share = columns / max(1, sum(layer["in_features"] for layer in facts["layers"]))
    exact = precision(facts["outlier_dtypes"])
    rows = [
        *_table(facts["layers"], every, exact),
        "",
        f"Model         {', '.join(map(str, _as_list(facts['architectures']))) or 'unknown'}, from {origin}",
        f"Format        {facts['format']}, written by {facts['producer']}",
        f"Outliers      criterion {facts['criterion'] or 'none stored'}, {share:.2%} of the columns in {exact}",
        f"Activations   {_activations(facts)}",
        *_coded(facts),
        *_searched(facts),
        f"On this CPU   {facts['runs_on']}",
        f"Size          {size(facts['bytes'])} in {count(len(facts['files']), 'file')}: "
        f"{count(len(facts['layers']), 'quantized layer' if facts['kbits'] else 'int8 layer')} "
        + size(facts["int8_layers_bytes"])
        + (f", {others}" if others else ""),
        *_placement(facts["block_bytes"], facts["outside_bytes"]),
        f"Not quantized {', '.join(facts['not_quantized']) or 'no linear layer'}",
    ]
    too = "quantized too" if facts["kbits"] else "in int8 too"
    if facts["int8_head"]:
        rows.append(f"Output head   {facts['int8_head']}, {too}")
    if facts["int8_embeddings"]:
        rows.append(f"Embeddings    {', '.join(facts['int8_embeddings'])}, {too}")
    return printable_lines(rows)


def _activations(facts: dict[str, Any]) -> str:
    kind, group = facts["activation"], facts["activation_group"]
    kbits = facts["kbits"] if sum(facts["kbits"].values()) == len(facts["layers"]) else None
    if group is not None or kbits:
        return inputs_in_words(kbits, kind, group)
    return f"{kind}, one scale for the whole row; it loads with activation_group=64, 128 or 256 too"


def _coded(facts: dict[str, Any]) -> list[str]:
    """Say what weights are beside quantized by row to the nearest integers."""
    rotated = [] if facts["rotation"] is None else [f"rotated, as their inputs, in blocks of {facts['rotation']}"]
    rounded = ["rounded by GPTQ"] if facts["rounding"] == "gptq" else []
    coded = [f"{words} in {count(number, 'layer')}" for words, number in facts["kbits"].items()]
    return [f"Weights       {', '.join(coded + rotated + rounded)}"] if coded + rotated + rounded else []


def _searched(facts: dict[str, Any]) -> list[str]:
    layers = facts["not_calibrated"]
    if not layers:
        return []
    if not facts["searches"]:
        return [f"Uncalibrated  {count(layers, 'layer')}, without outlier columns"]
    were = "was" if layers == 1 else "were"
    return [f"Searched      in {count(layers, 'layer')} that {were} not calibrated, |x| >= {facts['threshold']:g}"]


def _table(layers: Sequence[dict[str, Any]], every: bool, exact: str) -> list[str]:
    """Return a line for each layer; or for all those that differ in the numbers in their names only."""
    alike: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        name = layer["name"] if every else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer["name"])
        alike[name, layer["out_features"], layer["in_features"]].append(layer)
    width = max([5, *(len(name) for name, _, _ in alike)])
    number = "" if every else f"  {'number':>6}"
    columns = f"{exact.replace(' ', '-')} columns"
    rows = [f"{'layer':{width}}{number}  {'out':>7}  {'in':>7}  {columns:>15}  {'size of each':>18}"]
    for (name, out_features, in_features), ones in alike.items():
        number = "" if every else f"  {len(ones):>6}"
        outliers = [one["outliers"] for one in ones]
        rows.append(
            f"{name:{width}}{number}  {out_features:>7}  {in_features:>7}  "
            f"{'-' if None in outliers else _range(outliers):>15}  "
            f"{sizes(one['bytes'] for one in ones):>18}"
        )
    return rows


def _placement(blocks: dict[str, int], outside: dict[str, int]) -> list[str]:
    """Say what has to fit where: the blocks, which are placed whole, and what is outside of them."""
    stacks: dict[str, list[int]] = defaultdict(list)
    for name, nbytes in blocks.items():
        stacks[name.rpartition(".")[0]].append(nbytes)
    rows = [f"Blocks        {len(found)} x {stack}.*, {sizes(found)} each" for stack, found in stacks.items()]
    total = sum(outside.values())
    largest = [f"{name} {size(nbytes)}" for name, nbytes in outside.items() if nbytes >= _NAMED_SHARE * total]
    if rows and outside:
        named = f": {', '.join(largest)}" if largest else ""
        rest = f", and {len(outside) - len(largest)} smaller" if largest and len(largest) < len(outside) else ""
        rows.append(f"Outside       {size(total)}{named}{rest}")
    return rows


def _range(values: Sequence[int]) -> str:
    """Write the smallest and the largest, or the one there is."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
