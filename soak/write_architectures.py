"""Tries every family of `families.py` and writes `docs/architectures.md`: `python soak/write_architectures.py`."""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
conformance: Any = importlib.import_module("conformance")
families = conformance.families
DOCUMENT = conformance.ROOT / "docs" / "architectures.md"


def _in_a_folder(name: str) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return conformance.conform(name, Path(folder))


def document(results: Iterable[Any]) -> str:
    """Return the text of the document."""
    rows, notes = [], []
    for result in results:
        cells = [result.checks.get(check, "") for check in conformance.CHECKS]
        for place, verdict in enumerate(cells):
            if verdict not in ("", "yes"):
                notes.append(f"{len(notes) + 1}. {result.name}, {list(conformance.CHECKS.values())[place]}: {verdict}")
                cells[place] = f"({len(notes)})"
        if result.name in families.LUCK:
            notes.append(f"{len(notes) + 1}. {result.name}, bound: {families.LUCK[result.name][1]}")
        layers = f"{result.layers}" + (f", {result.kept} kept" if result.kept else "")
        figures = [f"{100 * result.error:.2f} %", f"{100 * conformance.bound(result.name, result.layers):.1f} %"]
        row = [result.name, families.FAMILIES[result.name], f"`{result.model}`", layers, *figures, *cells]
        rows.append(f"| {' | '.join(row)} |")
    head = ["family", "what is special", "class", "int8 layers", "error", "bound", *conformance.CHECKS.values()]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]
    refused = [f"- {name}: {why}" for name, why in families.REFUSED.items()]
    return _TEXT.format(
        room=conformance.ROOM,
        count=len(rows),
        table="\n".join(table),
        notes="\n".join(notes),
        refused="\n".join(refused),
    )


_TEXT = """# Architectures

<!-- Written by `python soak/write_architectures.py`; `make soak` tries the same. -->

A tiny random model of each of {count} families is converted with the defaults, loaded, and tried. It proves that a
family's code and its tensors go through every step; how accurate a real model is, `docs/accuracy.md` says.

- **error**: of the logits (or of what the model returns) in float32, relative to the 16-bit model's, Frobenius norm.
  **bound** is {room:g} times what rounding weight and input of each layer alone would make of it, 0.77 % times the
  square root of the number of layers; where they come from, `soak/conformance.py` says.
- **cache**: the logits of tokens generated one by one are those of all tokens at once.
- **beam search**: with three beams, the score of the best is that of its tokens all at once.
- **padded batch**: rows of unlike length in one batch give what each gives by itself.
- **saved, loaded again**: `save_pretrained`, `llmint8 verify`'s rules, `runtime.load`: the same bits come out.

The first three are held against the 16-bit model, which goes the same ways: the int8 one may be from itself as far as
that is, and 1 % more, for sums in another order. *kept*: layers that stay in 16 bit since the model's code uses their
weight. Experts are stacks, which format 1 leaves in 16 bit; `tests/test_experts.py` has them in format 2.

{table}

What is not plain in it:

{notes}

Refused, since nothing in them can be int8:

{refused}
"""


def main() -> None:
    """Try the families, all of them or those named, and write the document if it was all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="families; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.names or list(families.FAMILIES)
    results = []
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for result in pool.map(_in_a_folder, names):
            print(result, flush=True)
            results.append(result)
    if not arguments.names:
        DOCUMENT.write_text(document(results), encoding="utf-8")
    sys.exit(any(result.failed for result in results))


if __name__ == "__main__":
    main()
