"""One of two processes that hold models together; `test_parallel.py` starts both, and reads what they leave.

python tests/two_processes.py FOLDER, with RANK and what else torchrun sets. For each case in FOLDER/cases.json it loads
FOLDER/<model>, and leaves in FOLDER/<case>-<rank>.pt what came of it.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from llmint8 import runtime
from llmint8.formats import LLMInt8Error
from llmint8.runtime.layers.layer import Int8Linear
from llmint8.runtime.parallel.cut import cut_of

IDS = torch.arange(3, 51).view(2, 24) % 64


def observe(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Load a model, run it, save it, and say what it holds."""
    options = dict(case["options"])
    if ep_size := options.pop("ep_size", None):
        options["distributed_config"] = DistributedConfig(tp_plan="auto", ep_size=ep_size)
    model = runtime.load(folder / case["model"], dtype=torch.float32, **options)
    with torch.no_grad():
        logits = model(IDS).logits
    layers = {
        name: (layer.stored(), None if (cut := cut_of(layer)) is None else (cut.by, cut.pieces), type(layer.prepared))
        for name, layer in model.named_modules()
        if isinstance(layer, Int8Linear)
    }
    found = {
        "logits": logits,
        "layers": {name: (vars(stored), cut) for name, (stored, cut, _) in layers.items()},
        "floats": {name: _here(tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point()},
    }
    if case.get("generates"):
        found["generated"] = model.generate(IDS, max_new_tokens=4, do_sample=False)
    if case.get("saved"):
        model.save_pretrained(folder / case["saved"])
    if case.get("gradient"):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        found["gradient"] = embedded.grad
    try:
        runtime.dequantize(model)
    except LLMInt8Error as error:
        found["dequantize"] = str(error)
    return found


def _here(tensor: Any) -> int:
    return int((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(folder: Path) -> None:
    """Go through all cases; a collective that one process alone waits for ends by its timeout."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    kept = _Kept()
    for name in ("llmint8", "transformers"):
        logging.getLogger(name).addHandler(kept)
    logging.getLogger("llmint8").setLevel(logging.INFO)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        kept.lines.clear()
        try:
            found = observe(folder, case)
        except (LLMInt8Error, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save({**found, "log": list(kept.lines)}, folder / f"{name}-{os.environ['RANK']}.pt")
    dist.barrier()  # the first has the socket that the other talks to
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
