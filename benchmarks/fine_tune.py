"""Fine-tune a model with LoRA in 16 bit and in int8, with the same batches, and draw how the loss falls.

    python benchmarks/fine_tune.py SOURCE TEXT [--steps N] [--work DIRECTORY]

SOURCE is a 16-bit checkpoint with a tokenizer, converted with the defaults and with `--format 2 --rotate`. The adapters
(rank 8, on every linear layer of the blocks) begin alike and are trained on the first nine tenths of TEXT; the loss is
drawn that 8 windows of the last tenth have. Everything but int8 is computed in float32, as processors without bfloat16
instructions multiply 16-bit numbers at a fraction of that speed. At the end the adapter is merged, into int8 weights
in an int8 model. Printed, and written to `results/fine_tune-NAME.json` and `docs/images/fine-tuning.png`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.runtime.report.axes import BLUE, GREEN, ORANGE

ROOT = Path(__file__).parent.parent
LENGTH, BATCH, EVERY, RATE = 64, 2, 4, 1e-3
COLOURS = {"16 bit": BLUE, "int8": ORANGE, "int8, format 2, rotated": GREEN}


def models(source: Path, work: Path) -> dict[str, Any]:
    """Return what loads each model."""
    converter.convert(source, work / "first")
    converter.convert(source, work / "second", format=2, rotate=True)
    of_transformers = transformers.AutoModelForCausalLM.from_pretrained
    return {
        "16 bit": lambda: of_transformers(source, dtype=torch.float32),
        "int8": lambda: runtime.load(work / "first", dtype="float32"),
        "int8, format 2, rotated": lambda: runtime.load(work / "second", dtype="float32"),
    }


def held_out_loss(model: Any, windows: Tensor) -> float:
    """Return the mean loss over windows [W, LENGTH], in eval mode."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) for part in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(losses)


def fine_tune(model: Any, windows: Tensor, held_out: Tensor, steps: int) -> dict[str, Any]:
    """Train an adapter, merge it, and return the losses; `curve` is [step, held-out loss]."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=8, lora_alpha=16))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))
    curve, started = [[0, held_out_loss(model, held_out)]], time.perf_counter()
    for step in range(1, steps + 1):
        batch = windows[order[(step - 1) * BATCH : step * BATCH]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            curve.append([step, held_out_loss(model, held_out)])
            print(f"  step {step}: {curve[-1][1]:.4f}", flush=True)
    seconds = time.perf_counter() - started
    merged = held_out_loss(model.merge_and_unload(), held_out)
    return {
        "curve": curve,
        "merged": merged,
        "seconds": round(seconds, 1),
        "trained": sum(p.numel() for p in parameters),
    }


def draw(rows: dict[str, dict[str, Any]], name: str) -> Figure:
    """Draw the curves."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, row), marker in zip(rows.items(), "os^", strict=True):
        axes.plot(*zip(*row["curve"], strict=True), marker=marker, markersize=4, label=label, color=COLOURS[label])
    axes.set_xlabel(f"steps of {BATCH} x {LENGTH} tokens")
    axes.set_ylabel("loss on held-out text")
    axes.set_title(f"{name}, LoRA of rank 8 on every linear layer", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--work", type=Path, help="keep what is converted here, and take it from here")
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.source)
    windows = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8")).input_ids)
    windows = windows[: len(windows) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out = windows[len(windows) * 9 // 10 :][:8]
    windows = windows[: len(windows) * 9 // 10]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        for label, load in models(options.source, options.work or Path(work)).items():
            print(label, flush=True)
            rows[label] = fine_tune(load(), windows, held_out, options.steps)
            first, last = rows[label]["curve"][0][1], rows[label]["curve"][-1][1]
            print(f"{label}: {first:.4f} -> {last:.4f}, merged {rows[label]['merged']:.4f}", flush=True)
    name = options.source.name
    file = ROOT / "benchmarks" / "results" / f"fine_tune-{name}.json"
    file.write_text(json.dumps({"date": time.strftime("%F"), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(rows, name).savefig(ROOT / "docs" / "images" / "fine-tuning.png", dpi=110)


if __name__ == "__main__":
    main()
