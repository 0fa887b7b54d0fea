"""Time generation on a GPU: whole models in int8, eager and compiled, against float16 and bitsandbytes.

OPT-6.7B, Llama-3-8B and OPT-30B with random weights, made on the device layer by layer and quantized at once: ours with
16 outlier columns and zero point. The norms' outputs are ten times larger in these 16 dimensions, so that the threshold
of `bnb6` finds outliers where trained models have them. `fp16-compiled` runs in the loop that
`runtime.load(compile=True)` sets up for ours. bitsandbytes is left out where it is not importable.

Every variant generates 64 tokens after a prompt of 128, greedily. The first turn, which compiles, is only printed; the
rows have medians of three more. tokens_per_s counts the whole batch, from the second token on; first_token_ms is that
of the prompt. peak_memory_gb is the most that PyTorch had allocated in any turn, the first included, in which a CUDA
graph takes its memory, less the other models on the device; what the allocator holds in reserve depends on what ran
before, and is not counted. The variants take turns wherever their models fit on the device together, with a quarter
of it to spare; it is printed which do. Batch sizes are compiled apart, so that no result depends on those before it.

Prints a table and merges its rows into `results/gpu_generate-<device>.json` after every turn; `--models`, `--batches`
and `--variants` divide the work. What fails is named, and the rest goes on. Where llmint8 is not installed:
PYTHONPATH=.typing.

    python benchmarks/gpu_generate.py [--models OPT-6.7B,...] [--batches 1,8,32] [--variants fp16-eager,...]
"""

import argparse
import copy
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from generation import by_transformers, steps_per_second
from random_models import CONFIGS, build, companies
from result_files import merge, result_file
from torch import Tensor

from llmint8.converter.words import first_line
from llmint8.runtime.model.compiled import compile_decode

PROMPT_TOKENS, TOKENS, ROUNDS = 128, 64, 3
PROFILED_TOKENS = 8
BATCHES = (1, 8, 32)
KEYS = ("device", "model", "batch", "variant")
Run = Callable[[Tensor, int], list[float]]  # prompt, number of tokens -> the moment at which each came


class Variant(NamedTuple):
    """What runs: the kind of its model, in the compiled loop or not, and bitsandbytes' threshold."""

    kind: str
    compiled: bool = False
    threshold: float = 0.0


VARIANTS = {
    "fp16-eager": Variant("fp16"),
    "fp16-compiled": Variant("fp16", compiled=True),
    "ours-eager": Variant("ours"),
    "ours-compiled": Variant("ours", compiled=True),
    "bnb6-eager": Variant("bnb", threshold=6.0),
    "bnb0-eager": Variant("bnb"),
}


class Turn(NamedTuple):
    """One generation: seconds to the first token, and from it to the second, steps per second then, and bytes."""

    first: float
    second: float
    speed: float
    peak: int


def runner(model: Any, variant: Variant) -> Run:
    """Return the variant of a model, which shares its weights with the model's other variants."""
    model = copy.copy(model)
    model.generation_config = transformers.GenerationConfig()
    ready = not variant.compiled or compile_decode(model)

    def run(prompt: Tensor, tokens: int) -> list[float]:
        if not ready:
            raise RuntimeError("it cannot be compiled, as the warning says")
        for layer in model.modules() if variant.kind == "bnb" else ():
            if hasattr(layer, "state"):
                layer.state.threshold = variant.threshold
        return by_transformers(model, prompt, tokens)

    return run


def take_turn(run: Run, prompt: Tensor, weights: int) -> Turn:
    """Generate once with a model of so many bytes."""
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    moments = run(prompt, TOKENS)
    peak = torch.cuda.max_memory_allocated() - before + weights
    return Turn(moments[0] - start, moments[1] - moments[0], steps_per_second(moments), peak)


def check_compiled(run: Run, prompt: Tensor) -> str:
    """Say how many steps compiled code made, as PyTorch's profiler sees it. Raises RuntimeError if not all."""
    with torch.profiler.profile() as profile:
        run(prompt, PROFILED_TOKENS)
    calls, graphs, steps = 0, 0, PROFILED_TOKENS - 1
    for event in profile.key_averages():
        calls += event.count if "Call CompiledFxGraph" in event.key else 0
        graphs += event.count if event.key == "cudaGraphLaunch" else 0
    if calls < steps:
        raise RuntimeError(f"compiled code ran in {calls} of {steps} steps")
    return f"{steps} steps made {calls} calls of compiled code and {graphs} of CUDA graphs"


def measured(runs: dict[str, Run], prompt: Tensor, weights: dict[str, int], case: str) -> Iterator[dict[str, Any]]:
    """Let the variants take turns, drop those that fail; yield the row so far after each, without device and model."""
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    for number in range(1 + ROUNDS):
        for name in list(runs):
            try:
                turns[name].append(take_turn(runs[name], prompt, weights[VARIANTS[name].kind]))
                if number == 0:
                    print(f"{case}, {name}: {first_turn(turns[name][0], runs[name], prompt, name)}", flush=True)
            except Exception as error:
                not_measured(f"{case}, {name}", error)
                del runs[name]
            if name not in runs:
                gc.collect()  # the error held what the turn had on the device
            elif number:
                yield medians(name, len(prompt), turns[name])


def first_turn(turn: Turn, run: Run, prompt: Tensor, name: str) -> str:
    """Say how long the first turn took to get going, and what ran if it was compiled."""
    compilation = f", {check_compiled(run, prompt)}" if VARIANTS[name].compiled else ""
    return f"first turn {turn.first:.1f} s to the first token, {turn.second:.1f} s to the second{compilation}"


def medians(name: str, batch: int, turns: list[Turn]) -> dict[str, Any]:
    """Return the medians of all turns but the first, and the peak of all."""
    return {
        "batch": batch,
        "variant": name,
        "tokens_per_s": round(batch * statistics.median(turn.speed for turn in turns[1:]), 2),
        "first_token_ms": round(1e3 * statistics.median(turn.first for turn in turns[1:]), 2),
        "peak_memory_gb": round(max(turn.peak for turn in turns) / 1e9, 3),
    }


def not_measured(what: str, error: Exception) -> None:
    """Say so, in one line."""
    print(f"{what}: not measured: {first_line(error)}", flush=True)


def forget() -> None:
    """Drop what was compiled, and its CUDA graphs."""
    torch._dynamo.reset()
    gc.collect()


def rows_of(
    model: str, company: list[str], variants: list[str], batches: list[int], device: torch.device
) -> Iterator[Any]:
    """Build the kinds of a model that are together and measure their variants; yield rows without the device."""
    models, weights = {}, {}
    for kind in company:
        forget()
        before = torch.cuda.memory_allocated()
        try:
            models[kind] = build(CONFIGS[model], kind, device)
        except Exception as error:
            not_measured(f"{model}, {kind}", error)
        weights[kind] = torch.cuda.memory_allocated() - before
    chosen = {name: VARIANTS[name] for name in variants if VARIANTS[name].kind in models}
    for batch in batches:
        forget()
        torch.manual_seed(0)
        prompt = torch.randint(CONFIGS[model].vocab_size, (batch, PROMPT_TOKENS), device=device)
        # Nothing here holds the runs: `forget` is to find them gone, and what they had on the device with them.
        for row in measured(
            {name: runner(models[variant.kind], variant) for name, variant in chosen.items()},
            prompt,
            weights,
            f"{model}, batch {batch}",
        ):
            yield {"model": model} | row


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lay rows out for reading, with the speed as a multiple of two others'."""
    line = "{:12}{:>6}  {:15}{:>10}{:>15}{:>16}{:>17}{:>15}"
    measures = "tokens/s", "first token ms", "peak memory GB"
    yield line.format("model", "batch", "variant", *measures, "x fp16-compiled", "x bnb6-eager")
    speeds = {(row["model"], row["batch"], row["variant"]): row["tokens_per_s"] for row in rows}
    for row in sorted(rows, key=lambda row: (row["model"], row["batch"])):
        bases = (speeds.get((row["model"], row["batch"], name)) for name in ("fp16-compiled", "bnb6-eager"))
        ratios = ("-" if base is None else f"{row['tokens_per_s'] / base:.2f}" for base in bases)
        measures = f"{row['tokens_per_s']:.1f}", f"{row['first_token_ms']:.1f}", f"{row['peak_memory_gb']:.2f}"
        yield line.format(row["model"], row["batch"], row["variant"], *measures, *ratios)


def parse() -> argparse.Namespace:
    """Return models, batches and variants as lists; end with an error where one is unknown or there is no GPU."""
    importable = [name for name in VARIANTS if "bnb" not in name or importlib.util.find_spec("bitsandbytes")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(CONFIGS), help="some of: %(default)s")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="sequences at a time; %(default)s")
    parser.add_argument("--variants", default=",".join(importable), help=f"some of: {', '.join(VARIANTS)}")
    options = parser.parse_args()
    options.models, options.variants = options.models.split(","), options.variants.split(",")
    if not all(batch.isdecimal() and int(batch) for batch in options.batches.split(",")):
        parser.error(f"--batches is {options.batches!r}, expected numbers such as 1,8,32")
    options.batches = [int(batch) for batch in options.batches.split(",")]
    for what, known in (("models", CONFIGS), ("variants", VARIANTS)):
        if unknown := set(getattr(options, what)) - set(known):
            parser.error(f"--{what}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures a GPU")
    return options


def run(options: argparse.Namespace, device: torch.device, name: str, file: Path) -> list[dict[str, Any]]:
    """Measure what the options name; keep each row as soon as there is one, and return all that the file then holds."""
    room = 0.75 * torch.cuda.get_device_properties(device).total_memory
    kinds = list(dict.fromkeys(VARIANTS[variant].kind for variant in options.variants))
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for company in companies(CONFIGS[model], kinds, room):
            print(f"{model}: together on the device: {', '.join(company)}", flush=True)
            for row in rows_of(model, company, options.variants, options.batches, device):
                rows = merge(file, [{"device": name} | row], KEYS)
    return rows


def main() -> None:
    """Parse, measure, print."""
    options = parse()
    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, {versions}", flush=True)
    for line in table(run(options, torch.device("cuda"), name, result_file("gpu_generate", name))):
        print(line)


if __name__ == "__main__":
    main()
