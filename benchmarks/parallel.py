"""One model on several processes: how fast it generates, what each holds, and how close it is to its source.

    python benchmarks/parallel.py CHECKPOINT SOURCE TEXT --threads 2
    torchrun --nproc-per-node 2 benchmarks/parallel.py CHECKPOINT SOURCE TEXT --threads 1

Both print one line; the first is what the second is held against. KL is the mean divergence from the source in float32
to the checkpoint, over the windows of a text, in nats for a token.
"""

import os
from pathlib import Path
from typing import Any

import click
import torch
from generation import by_transformers, steps_per_second
from torch.distributed.tensor import DTensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmint8 import runtime


def held(model: Any) -> int:
    """Return the bytes of the parameters that this process has, tied ones once."""
    local = [one.to_local() if isinstance(one, DTensor) else one for one in model.parameters()]
    return sum(tensor.nbytes for tensor in local)


def divergence(model: Any, source: Any, windows: torch.Tensor) -> float:
    """Return the mean KL divergence of the model from its source, over int64 [windows, length]."""
    total = 0.0
    for window in windows.split(1):
        with torch.no_grad():
            ours, theirs = (one(window).logits.float().log_softmax(-1) for one in (model, source))
        total += float(kl_div(ours, theirs, log_target=True, reduction="sum")) / windows.numel()
    return total


@click.command()
@click.argument("checkpoint")
@click.argument("source")
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", default=1, show_default=True, help="Of each process.")
@click.option("--tokens", default=96, show_default=True, help="To generate.")
@click.option("--rounds", default=3, show_default=True, help="Of which the fastest counts.")
@click.option("--windows", default=4, show_default=True, help="Of 512 tokens; 0 leaves the text out.")
@click.option("--group", default="row", show_default=True, help="activation_group: a number, or row.")
def main(
    checkpoint: str, source: str, text: Path, threads: int, tokens: int, rounds: int, windows: int, group: str
) -> None:
    """Measure CHECKPOINT in as many processes as this was started in."""
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"activation_group": "row" if group == "row" else int(group)}
    if "WORLD_SIZE" in os.environ:
        options["tp_plan"] = "auto"
    model = runtime.load(checkpoint, dtype=torch.float32, **options)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8")).input_ids
    speeds = [steps_per_second(by_transformers(model, torch.tensor([ids[:32]]), tokens)) for _ in range(rounds)]
    said = f"{max(speeds, default=0):.1f} tokens/s, {held(model) / 1e6:.1f} MB of parameters"
    if windows:
        exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        chosen = torch.tensor(ids[: windows * 512]).view(windows, 512)
        said += f", KL {divergence(model, exact, chosen):.6f}"
    if first:
        click.echo(f"{os.environ.get('WORLD_SIZE', 1)} x {threads} threads, group {group}: {said}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
