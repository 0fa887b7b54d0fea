"""Measure conversions: their speed against `cp -r` of the same files, and their memory above what the imports take.

A synthetic OPT with 2 billion random fp16 parameters (4 GB in shards of 500 MB) is made in a temporary directory.
`cp -r` and the data-free conversion take turns, each into a new directory after a `sync`; the medians are compared.
Ours waits until its files are on the disk, `cp` does not, so `cp -r` with a `sync` after it stands beside. The
calibrated conversion runs once. Each conversion has a process of its own; its time begins after the imports. The peak
is of the resident memory over its value after the imports; the bound is what the project promises. Printed, and written
to `results/convert-INSTRUCTIONS.json`, so that runs on other machines stand beside.

    python benchmarks/convert.py [DIRECTORY]
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmint8.kernels.cpu import native

CHILD = """
import json, sys, time
import torch, transformers
from llmint8 import converter

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

transformers.OPTForCausalLM  # the lazy import of the model code belongs to the imports
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
started = time.monotonic()
report = converter.convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps({
    "seconds": round(time.monotonic() - started, 2),
    "peak_above_imports_mb": round((status("VmHWM") - before) / 1e6, 1),
    "bytes_before": report.bytes_before,
    "bytes_after": report.bytes_after,
}))
"""


def make_source(directory: Path) -> int:
    """Write the synthetic checkpoint, shard by shard, and return the bytes of its largest tensor."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.OPTConfig(
        hidden_size=2560, ffn_dim=10240, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2560
    )
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.OPTForCausalLM(config).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > 500e6:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.empty(shapes[n], dtype=torch.float16).normal_(0, 0.02) for n in names}
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(2 * shape.numel() for shape in shapes.values())


def timed(*command: str | Path) -> float:
    """Run a command and return its seconds."""
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def convert(source: Path, out: Path, options: dict[str, str]) -> dict[str, float]:
    """Convert in a process of its own, and return what it measured."""
    command = [sys.executable, "-c", CHILD, source, out, json.dumps(options)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main() -> None:
    """Take turns, print a table, write the results."""
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        source, out = Path(directory) / "source", Path(directory) / "out"
        source.mkdir()
        largest = make_source(source)
        times: dict[str, list[float]] = {"cp -r": [], "cp -r, sync": [], "data-free": []}
        for number in range(-1, ROUNDS):  # the first turn fills the page cache
            before = timed("cp", "-r", source, out)
            synced = before + timed("sync")
            shutil.rmtree(out)
            free = convert(source, out, {"outliers": "none"})
            shutil.rmtree(out)
            if number >= 0:
                for name, seconds in zip(times, (before, synced, free["seconds"]), strict=True):
                    times[name].append(round(seconds, 2))
                print(json.dumps({name: values[-1] for name, values in times.items()}), flush=True)
        calibrated = convert(source, out, {})
    rows = []
    for name, found, allowance in (("data-free", free, 256), ("calibrated", calibrated, 512)):
        # The calibrated one also allows the activations of the batch; left out here, its bound is the stricter.
        bound = 2.5 * largest / 1e6 + allowance
        rows.append({"conversion": name, "largest_tensor_mb": largest / 1e6, "bound_mb": bound, **found})
        print(json.dumps(rows[-1]), flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"data-free: {medians['cp -r'] / medians['data-free']:.2f} x the speed of cp -r, "
        f"{medians['cp -r, sync'] / medians['data-free']:.2f} x that of cp -r with sync"
    )
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "seconds": times,
        "rows": rows,
    }
    kind = native.kinds()[0] if native.kinds() else "none"
    file = Path(__file__).parent / "results" / f"convert-{kind}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


ROUNDS = 5

if __name__ == "__main__":
    main()
