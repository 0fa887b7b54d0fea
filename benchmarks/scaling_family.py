"""Train a family of models and repeat on it what "The case for 4-bit precision" says of k-bit weights.

    python benchmarks/scaling_family.py TEXT --models DIR [--steps 900] [--widths 64,96,128,192] [--train]

TEXT is a text of a megabyte, such as the validation split of WikiText-2. Four widths of one Llama are trained on the
bytes of its first nine tenths, for minutes on two cores, and saved into DIR in float16; those that are there are taken
as they are. On the last tenth every precision, data type and block size is measured, as `llmint8 scaling` does;
training and runs go on in DIR after an interruption. What the numbers say of the paper's claims goes to
`results/scaling_family.json`, the first picture to `docs/images/scaling-family.png`, and the page to DIR.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from llmint8.converter.commands.progress import progress_bar
from llmint8.kernels.kbit.levels import DataType
from llmint8.runtime.report.document import png
from llmint8.runtime.scaling.comparing import KEYS, Key, choice, value_words, winners
from llmint8.runtime.scaling.family import left_to_do, measure_family, open_family
from llmint8.runtime.scaling.page import advice, page, winners_text
from llmint8.runtime.scaling.plots import precisions
from llmint8.runtime.scaling.runs import Run, RunFile
from llmint8.runtime.scaling.schemes import BASE, combinations

BLOCKS, TOKENS = (32, None), 8192
LAYERS, HEAD, LENGTH, BATCH = 3, 32, 256, 8
PEAK, WARM_UP = 3e-3, 40


def train(directory: Path, width: int, text: str, steps: int) -> None:
    """Train a Llama of so many dimensions on the bytes of a text, and save it in float16 with its tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([], vocab_size=256, show_progress=False)  # the bytes, and no pair of them
    ids = torch.tensor(tokenizer.encode(text).ids)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    begun, first, began = directory / "training.pt", 0, time.monotonic()
    if begun.exists():
        first, states = torch.load(begun)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    for step in range(first, steps):
        torch.manual_seed(step)  # the same batches, wherever it was interrupted
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            directory.mkdir(parents=True, exist_ok=True)
            torch.save((step + 1, (model.state_dict(), optimizer.state_dict())), begun.with_suffix(".new"))
            begun.with_suffix(".new").replace(begun)
            print(
                f"width {width}: step {step + 1}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True
            )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(directory)
    model.half().save_pretrained(directory)
    begun.unlink(missing_ok=True)


def found_in(runs: list[Run]) -> dict[str, Any]:
    """Look up what the paper says in the numbers."""
    base = [run for run in runs if run.scheme == BASE]
    tables: dict[str, Any] = {}
    for key in KEYS:
        found = choice(runs, key)
        assert found is not None
        tables[key] = {
            "all_else": found.held,
            "kl": by_name(key, found.table),
            "perplexity_at_equal_bits_over": value_words(key, found.values[0]),
            "perplexity_at_equal_bits": by_name(key, found.at_equal_bits),
        }
    return {
        "models": [
            {"model": run.measured.model, "weights": run.weights, "bits": run.total_bits, "perplexity": run.perplexity}
            for run in base
        ],
        "tokens": base[0].measured.tokens,
        "runs": len(runs),
        "choices": tables,
        "best_for_its_bits": {"nearest": of_precisions(plain(runs)), "nearest, gptq and proxy": of_precisions(runs)},
        "advice": advice(runs),
    }


def plain(runs: list[Run]) -> list[Run]:
    """Return the runs that the paper's are like: rounded to nearest, and no columns kept."""
    return [run for run in runs if run.scheme.rounding == "nearest" and not run.scheme.proxy]


def of_precisions(runs: list[Run]) -> dict[str, Any]:
    """Return how often each precision is the best for its bits, between which numbers of bits."""
    won = winners(runs)
    assert won is not None
    return {"from": round(won.low), "to": round(won.high), **won.shares}


def by_name(key: Key, table: dict[int, dict[Any, float]]) -> dict[int, dict[str, float]]:
    """Return a table of values of a choice by what they are called, with six digits."""
    return {
        bits: {value_words(key, value): float(f"{number:.6g}") for value, number in row.items()}
        for bits, row in table.items()
    }


def main() -> None:
    """Train, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--widths", default="64,96,128,192")
    parser.add_argument("--train", action="store_true", help="stop when they are trained")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    directories = [arguments.models / f"width-{width}" for width in arguments.widths.split(",")]
    for directory in directories:
        if not (directory / "config.json").exists():
            train(directory, int(directory.name.removeprefix("width-")), text[:cut], arguments.steps)
    if arguments.train:
        return
    held_out = arguments.models / "held-out.txt"
    held_out.write_text(text[cut:], encoding="utf-8")
    file = RunFile(arguments.models / "runs.jsonl")
    members = open_family(directories, held_out, TOKENS, LENGTH)
    schemes = combinations(range(3, 9), get_args(DataType), BLOCKS, [0.0], ["nearest"])
    schemes += combinations(range(3, 9), ["quantile"], BLOCKS[:1], [0.0, 0.02], ["nearest", "gptq"])
    schemes = list(dict.fromkeys(schemes))
    work = left_to_do(members, schemes, file)
    with progress_bar(sum(one.nbytes for one in work), "Measuring", quiet=False) as advance:
        measure_family(work, file, "cpu", advance)
    runs = [run for member in members for run in file.of(member.measured) if run.scheme in schemes]
    results = Path(__file__).parent / "results"
    (results / "scaling_family.json").write_text(json.dumps(found_in(runs), indent=2) + "\n")
    (arguments.models / "scaling.html").write_text(page(runs), encoding="utf-8")
    (Path(__file__).parents[1] / "docs/images/scaling-family.png").write_bytes(png(precisions(plain(runs))))
    print(advice(runs), winners_text(plain(runs)), winners_text(runs), sep="\n")


if __name__ == "__main__":
    main()
