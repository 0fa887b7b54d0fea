"""Measure what OPT-175B asks for, on one machine: conversions of its true layer shapes, and of its number of files.

Two checkpoints of random weights are written as metaseq and fairscale write them, eight model-parallel parts each:

- `shapes`: hidden 12288, FFN 49152, 96 heads, with as many of the 96 layers as asked for;
- `files`: all 96 layers at a reduced width, in 124 shards of each part: 992 files, with a limit of 1,024 open ones.

Each is converted from that form and from safetensors files with the same tensors, in processes of their own, with files
that are in no cache: `files` data-free, `shapes` calibrated too. What that made is loaded, and one forward pass is run.
The peak is of the resident memory over its value after the imports. One layer of OPT-175B has 3.6 GB in 16 bit; what is
projected to 96 layers assumes that all layers take as long, and that the embedding is read once. Printed, and written
to `results/scale-INSTRUCTIONS.json`.

    python benchmarks/scale.py [DIRECTORY] [--layers 3] [--width 2048]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from convert import convert
from result_files import result_file
from safetensors.torch import save_file
from torch import Tensor

from llmint8.formats import open_source
from llmint8.kernels.cpu import native

PARTS, HIDDEN, LAYERS, SHARDS, VOCABULARY, POSITIONS = 8, 12288, 96, 124, 50272, 2050
OPEN_FILES = 1024
DATA_FREE = {"data-free": {"outliers": "none"}}
LOAD = """
import json, sys, time
import torch, transformers
from llmint8 import runtime

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

transformers.OPTForCausalLM
open("/proc/self/clear_refs", "w").write("5")
before, started = status("VmRSS"), time.monotonic()
offload = json.loads(sys.argv[2])
model = runtime.load(sys.argv[1], **({"device_map": "auto", "offload_folder": offload} if offload else {}))
loaded = time.monotonic()
with torch.no_grad():
    logits = model(torch.arange(2, 18)[None]).logits
print(json.dumps({
    "load_seconds": round(loaded - started, 2),
    "forward_seconds": round(time.monotonic() - loaded, 2),
    "finite": bool(logits.isfinite().all()),
    "peak_above_imports_mb": round((status("VmHWM") - before) / 1e6, 1),
    "offloaded": bool(offload),
}))
"""


def units(hidden: int, layers: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the units that FSDP would flatten, of one model-parallel part: path, parameters by name."""

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16).normal_(0, 0.02)

    def same(*shape: int, value: float = 0.0) -> Tensor:
        return torch.full(shape, value, dtype=torch.float16)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": same(hidden, value=1.0), f"{name}.bias": same(hidden)}

    yield (
        "",
        {
            "decoder.embed_tokens.weight": normal(VOCABULARY // PARTS, hidden),
            "decoder.embed_positions.weight": same(POSITIONS, hidden, value=0.01),
            **norm("decoder.layer_norm"),
        },
    )
    for number in range(layers):
        yield (
            f"decoder.layers.{number}",
            {
                "self_attn.qkv_proj.weight": normal(3 * hidden // PARTS, hidden),
                "self_attn.qkv_proj.bias": normal(3 * hidden // PARTS),
                "self_attn.out_proj.weight": normal(hidden, hidden // PARTS),
                "self_attn.out_proj.bias": same(hidden),
                **norm("self_attn_layer_norm"),
                "fc1.weight": normal(4 * hidden // PARTS, hidden),
                "fc1.bias": normal(4 * hidden // PARTS),
                "fc2.weight": normal(hidden, 4 * hidden // PARTS),
                "fc2.bias": same(hidden),
                **norm("final_layer_norm"),
            },
        )


def write_metaseq(folder: Path, hidden: int, layers: int, shards: int) -> None:
    """Write a checkpoint; a part of it is in memory at a time."""
    folder.mkdir()
    for part in range(PARTS):
        torch.manual_seed(part)
        models: list[dict[str, Tensor]] = [{"decoder.version": torch.tensor([3.0])} for _ in range(shards)]
        described: list[list[dict[str, Any]]] = [[] for _ in range(shards)]
        for path, tensors in units(hidden, layers):
            shapes = [tensor.shape for tensor in tensors.values()]
            flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
            share = -(-len(flat) // shards)
            for rank in range(shards):
                chunk = flat[rank * share : (rank + 1) * share]
                padding = share - len(chunk)
                models[rank][f"{path}.flat_param_0".lstrip(".")] = torch.nn.functional.pad(chunk, (0, padding)).clone()
                names = {"names": [*tensors], "shapes": shapes, "numels": [shape.numel() for shape in shapes]}
                described[rank].append({"fsdp_path": path, "params": {"flat_param_0": {**names, "padding": padding}}})
        for rank in range(shards):
            metadata = {"buffer_names": ["decoder.version"], "param_metadata": described[rank]}
            saved = {"model": models[rank], "shard_metadata": metadata, "cfg": None}
            torch.save(saved, folder / f"checkpoint_last-model_part-{part}-shard{rank}.pt")
            models[rank].clear()


def write_safetensors(metaseq: Path, folder: Path) -> int:
    """Write the same tensors as the Hub has them, a shard of 4 GB at a time; return the bytes of all of them."""
    source = open_source(metaseq)
    shutil.copytree(source.beside, folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    names = list(source.tensors)
    for name in names:
        shard[name] = source.read(name)
        if sum(tensor.nbytes for tensor in shard.values()) > 4e9 or name == names[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(info.nbytes for info in source.tensors.values())


def evict(folder: Path) -> None:
    """Have the files read from the disk the next time, as those of 350 GB are."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def conversions(folder: Path, nbytes: int, ways: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    """Convert both forms in each of the ways; leave what the last one made in `out`."""
    rows: dict[str, Any] = {}
    for name, options in ways.items():
        for form in ("safetensors", "metaseq"):
            shutil.rmtree(folder / "out", ignore_errors=True)
            evict(folder / form)
            found = convert(folder / form, folder / "out", options)
            rows[f"{name}, {form}"] = {**found, "mb_per_second": round(nbytes / 1e6 / found["seconds"], 1)}
            print(name, form, rows[f"{name}, {form}"], flush=True)
        ratio = rows[f"{name}, metaseq"]["seconds"] / rows[f"{name}, safetensors"]["seconds"]
        rows[f"{name}, metaseq against safetensors"] = round(ratio, 3)
        print(f"{name}: metaseq takes {ratio:.2f} x the time of safetensors", flush=True)
    return rows


def measure(folder: Path, hidden: int, layers: int, shards: int, ways: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    """Write one checkpoint in both forms, and convert it."""
    folder.mkdir()
    write_metaseq(folder / "metaseq", hidden, layers, shards)
    started = time.monotonic()
    open_source(folder / "metaseq")
    opened = round(time.monotonic() - started, 2)
    nbytes = write_safetensors(folder / "metaseq", folder / "safetensors")
    facts = {"hidden": hidden, "layers": layers, "files": PARTS * shards, "bytes": nbytes, "open_seconds": opened}
    print(facts, flush=True)
    return {**facts, "conversions": conversions(folder, nbytes, ways)}


def projected(found: dict[str, Any]) -> dict[str, Any]:
    """Project the calibrated conversion to 96 layers and 992 files."""
    layer = 12 * HIDDEN * HIDDEN * 2
    row = found["conversions"]["calibrated, metaseq"]
    whole = found["bytes"] + (LAYERS - found["layers"]) * layer
    return {
        "layer_mb": layer / 1e6,
        "peak_in_layers": round(row["peak_above_imports_mb"] * 1e6 / layer, 2),
        "hours_of_96_layers": round(row["seconds"] * whole / found["bytes"] / 3600, 2),
    }


def run_result(folder: Path, nbytes: int) -> dict[str, Any]:
    """Load what was converted and run one forward pass; from the disk where memory would not hold it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    offload = str(folder / "offload") if nbytes > 0.7 * free else None
    command = [sys.executable, "-c", LOAD, str(folder / "out"), json.dumps(offload)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main() -> None:
    """Measure both checkpoints one after the other, and write the results."""
    parser = argparse.ArgumentParser(description="Conversions of OPT-175B's shapes, and of its number of files.")
    parser.add_argument("directory", nargs="?", help="where the checkpoints are written; a temporary one by default")
    parser.add_argument("--layers", type=int, default=3, help="layers of the true shape; 10 GB of disk for each")
    parser.add_argument("--width", type=int, default=2048, help="hidden features of the 96 layers in 992 files")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        shapes = Path(directory) / "shapes"
        result["shapes"] = measure(shapes, HIDDEN, arguments.layers, 4, {**DATA_FREE, "calibrated": {}})
        result["shapes"]["projection"] = projected(result["shapes"])
        shutil.rmtree(shapes / "metaseq")
        shutil.rmtree(shapes / "safetensors")
        made = sum(file.stat().st_size for file in (shapes / "out").iterdir())
        result["shapes"]["loaded"] = run_result(shapes, made)
        print(result["shapes"], flush=True)
        shutil.rmtree(shapes)
        result["files"] = measure(Path(directory) / "files", arguments.width, LAYERS, SHARDS, DATA_FREE)
    result = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), **result}
    file = result_file("scale", native.kinds()[0] if native.kinds() else "none")
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
