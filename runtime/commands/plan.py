"""The command `llmint8 plan`: what a model takes before there is any of it, and which GPUs hold it."""

import json
from collections.abc import Sequence
from typing import Any

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.terminal import printable, printable_lines
from llmint8.converter.words import count, size

_HELD = {"int8": True, "half": False}


@click.command("plan", cls=Command)
@click.argument("source")
@click.option(
    "--gpu",
    "machines",
    metavar="GPUS",
    multiple=True,
    help="A machine, such as 8x24GB, A100-80GB:4 or 24GB,T4: what each GPU would hold. Repeatable.",
)
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(1, 1 << 24),
    default=2048,
    show_default=True,
    help="Tokens of a text, prompt and answer.",
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Texts at a time."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan_command(source: str, machines: Sequence[str], context: int, batch: int, as_json: bool) -> None:
    """Say what a model takes in 16 bit and in int8, and which GPUs hold it, before it is downloaded or converted.

    SOURCE is a directory or a Hub id, in 16 bit or in int8, or a size that is known by name, such as opt-175b. Of a Hub
    id, config.json and the headers of the weight files are fetched, and no weights.
    """
    set_up_logging(False)
    from ..placement.gpus import parse_machine

    named = {text: parse_machine(text) for text in machines}
    from ..placement.opened import open_sized
    from ..placement.plan import Plan

    plan = Plan(open_sized(source), context, batch)
    facts = _facts(plan, named)
    if not as_json:
        for notice in facts["notices"]:
            click.echo(f"Note: {printable(notice)}", err=True)
    echo_result(json.dumps(facts, indent=2) if as_json else _text(facts))


def _facts(plan: Any, machines: dict[str, Any]) -> dict[str, Any]:
    from ..placement.gpus import CONTEXT_BYTES, DRIVER_SHARE

    sized = plan.sized
    return {
        "source": sized.name,
        "origin": sized.origin,
        "coded": sized.coded,
        "class": None if sized.model is None else type(sized.model).__name__,
        "parameters": sized.parameters,
        "blocks": len(sized.blocks),
        "int8_layers": sum(part.int8 is not None for part in sized.parts),
        "format": sized.layout.major,
        "outlier_columns": sized.outliers,
        "context": plan.context,
        "longest_context": plan.longest,
        "batch": plan.batch,
        "by_kind": plan.by_kind(),
        "half_bytes": plan.taken(False),
        "int8_bytes": plan.taken(True),
        "int8_bytes_on_disk": plan.on_disk,
        "cache_bytes": None if sized.cache is None else sum(plan.cache.values()),
        "reserved": {
            "context_bytes": CONTEXT_BYTES,
            "driver_share": DRIVER_SHARE,
            "activation_bytes": plan.activations,
        },
        "machines": [_machine(plan, name, gpus) for name, gpus in machines.items()],
        "smallest_sets": plan.smallest_sets(),
        "notices": [*sized.notices, *plan.notices],
    }


def _machine(plan: Any, name: str, gpus: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    for key, int8 in _HELD.items():
        shares = plan.split(gpus, int8)
        found[key] = {
            "fits": all(share.free >= 0 for share in shares),
            "longest_context": plan.longest_context(gpus, int8),
            "gpus": [_share(share) for share in shares],
        }
    return found


def _share(share: Any) -> dict[str, Any]:
    return {
        "name": share.gpu.name,
        "memory": share.gpu.memory,
        "reserved": share.gpu.reserved,
        "activations": share.activations,
        "weights": share.weights,
        "cache": share.cache,
        "free": share.free,
        "holds": [unit.name for unit in share.units],
    }


def _text(facts: dict[str, Any]) -> str:
    known = facts["class"] or "no model that transformers knows"
    rows = [
        f"Model         {facts['source']} ({facts['origin']}): {known}, {facts['parameters']:,} parameters, "
        f"{count(facts['blocks'], 'block')}",
        f"{facts['coded'].capitalize():13} {count(facts['int8_layers'], 'linear layer')}, "
        f"{facts['outlier_columns']:g} columns of each in 16 bit on average, format {facts['format']}",
        f"Runs with     {facts['context']:,} tokens of context, {count(facts['batch'], 'text')} at a time",
        "",
        *_sizes(facts),
        "",
        *_reserved(facts),
    ]
    for machine in facts["machines"]:
        rows += ["", *_machine_rows(machine, facts)]
    return printable_lines([*rows, "", *_sets(facts)])


def _sizes(facts: dict[str, Any]) -> list[str]:
    rows = [("In GPU memory", "16 bit", facts["coded"])]
    rows += [(one["what"], size(one["half"]) if one["half"] else "", size(one["int8"])) for one in facts["by_kind"]]
    rows.append(("All weights", size(facts["half_bytes"]), size(facts["int8_bytes"])))
    rows.append(("- on the disk", size(facts["half_bytes"]), size(facts["int8_bytes_on_disk"])))
    cache = "not known" if facts["cache_bytes"] is None else size(facts["cache_bytes"])
    rows.append(("Keys and values", cache, cache))
    return [f"{what:24} {half:>10} {int8:>10}".rstrip() for what, half, int8 in rows]


def _reserved(facts: dict[str, Any]) -> list[str]:
    reserved = facts["reserved"]
    return [
        f"Reserved on each GPU: {size(reserved['context_bytes'])} for the CUDA context and libraries, "
        f"{reserved['driver_share']:.0%} of its memory for the",
        f"driver, and {size(reserved['activation_bytes'])} for activations (an estimate; all tokens in one pass).",
    ]


def _machine_rows(machine: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    rows = []
    for key, what in (("int8", facts["coded"]), ("half", "16 bit")):
        rows.append(f"{machine['name']}, {what}: {_verdict(machine[key], facts)}")
        if key == "int8":
            rows += _shares(machine[key]["gpus"])
    return rows


def _verdict(found: dict[str, Any], facts: dict[str, Any]) -> str:
    longest = found["longest_context"]
    least = min(gpu["free"] for gpu in found["gpus"])
    if found["fits"]:
        more = "" if longest == facts["longest_context"] else f"; up to {longest:,} tokens of context"
        return f"fits, {size(least)} free where it is least{more}"
    then = f"; with up to {longest:,} tokens of context it does" if longest else ""
    return f"does not fit, {size(-least)} are missing on one GPU{then}"


def _shares(gpus: list[dict[str, Any]]) -> list[str]:
    rows = [f"{'GPU':<3}  {'memory':>9}  {'weights':>9}  {'cache':>9}  {'reserved':>9}  {'free':>9}  holds"]
    for number, gpu in enumerate(gpus):
        numbers = (gpu["memory"], gpu["weights"], gpu["cache"], gpu["reserved"] + gpu["activations"])
        cells = [size(nbytes) for nbytes in numbers]
        free = f"-{size(-gpu['free'])}" if gpu["free"] < 0 else size(gpu["free"])
        rows.append("  ".join([f"{number:<3}", *(f"{cell:>9}" for cell in [*cells, free]), _holds(gpu["holds"])]))
    return rows


def _holds(units: list[str]) -> str:
    """Name what a GPU holds: runs of blocks by the first and the last of them."""
    runs: list[list[str]] = []
    for unit in units:
        stack, _, number = unit.rpartition(".")
        last = runs[-1][-1].rpartition(".") if runs else ("", "", "")
        if number.isdecimal() and last[0] == stack and last[2].isdecimal():
            runs[-1].append(unit)
        else:
            runs.append([unit])
    named = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1].rpartition('.')[2]}" for run in runs]
    return ", ".join(named) or "nothing"


def _sets(facts: dict[str, Any]) -> list[str]:
    from ..placement.plan import MOST_GPUS

    rows = [f"{'GPUs that hold it':34} {facts['coded']:>6} {'16 bit':>7}   (-: more than {MOST_GPUS})"]
    for one in facts["smallest_sets"]:
        name = f"{one['gb']} GB".ljust(8) + ", ".join(one["gpus"])
        numbers = [str(one[key] or "-") for key in _HELD]
        rows.append(f"{name:34} {numbers[0]:>6} {numbers[1]:>7}")
    return rows
