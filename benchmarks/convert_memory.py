"""Measure the peak memory of a conversion, above what the imports take.

A synthetic OPT with 1.3 billion random fp16 parameters (2.6 GB in shards of 500 MB) is made in a temporary directory
and converted in a process of its own. Printed, and written to `results/convert_memory.json`: the largest tensor, the
peak of the resident memory over its value after the imports, and the bound that the project promises.

    python benchmarks/convert_memory.py [DIRECTORY]
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    "seconds": round(time.monotonic() - started, 1),
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
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
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


def main() -> None:
    """Measure each kind of conversion once."""
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    rows = []
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        source = Path(directory) / "source"
        source.mkdir()
        largest = make_source(source)
        for name, options, allowance in KINDS:
            command = [sys.executable, "-c", CHILD, source, Path(directory) / name, json.dumps(options)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            bound = 2.5 * largest / 1e6 + allowance
            rows.append({"conversion": name, "largest_tensor_mb": largest / 1e6, "bound_mb": bound, **json.loads(out)})
            print(json.dumps(rows[-1]), flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(), "rows": rows}
    file = Path(__file__).parent / "results" / "convert_memory.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")


# name, options of `convert`, what the bound allows in MB beside 2.5 x the largest tensor; the calibrated one also
# allows the activations of the batch, which are left out here: the bound is the stricter for it
KINDS = [("data-free", {"outliers": "none"}, 256), ("calibrated", {"outliers": "top-k=16"}, 512)]

if __name__ == "__main__":
    main()
