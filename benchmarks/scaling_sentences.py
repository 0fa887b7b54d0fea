"""How far the embeddings of an encoder of sentences are off with k-bit weights, for every precision and data type.

    python benchmarks/scaling_sentences.py SOURCE TEXT [--tokens 1024]

SOURCE is an encoder with a tokenizer and its way of pooling, as sentence-transformers saves one; each line of TEXT is a
sentence. The weights of all linear layers are replaced by what they are after rounding to nearest; inputs stay in
float32. Printed and kept in `results/scaling_sentences-NAME.json`; what is there already is not measured again.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import result_files
import torch
import transformers
from torch import Tensor

from llmint8.converter.calibration.text import read_text
from llmint8.converter.model.build import is_linear
from llmint8.kernels.kbit.levels import DataType
from llmint8.kernels.kbit.reference import dequantize_codes, quantize_weight
from llmint8.runtime.accuracy.embeddings import distances
from llmint8.runtime.accuracy.pooling import Pooling, read_pooling

TYPES: tuple[DataType, ...] = ("int", "float", "dynamic", "quantile")
Scheme = tuple[int, DataType, int | None]
SCHEMES: list[Scheme] = [(4, "nf4", 64), *((bits, kind, 64) for bits, kind in product((4, 3, 8, 6), TYPES))]
SCHEMES += [(bits, "int", block) for bits, block in product((4, 8), (32, None))]
KEYS = ("bits", "data_type", "block", "texts", "tokens")


def sentences(tokenizer: Any, lines: list[str], tokens: int, longest: int | None) -> list[Tensor]:
    """Return token ids [1, length] of lines from the beginning, of equal ones the first."""
    found, taken = [], 0
    for line in dict.fromkeys(filter(None, map(str.strip, lines))):
        ids = tokenizer(line, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
        taken += ids.numel()
        if taken > tokens:
            break
        found.append(ids)
    return found


@torch.no_grad()
def embeddings(model: Any, texts: list[Tensor], pooling: Pooling) -> Tensor:
    """Return the embeddings [texts, D]."""
    return torch.cat([pooling(model(input_ids=ids)[0]) for ids in texts])


@torch.no_grad()
def main() -> None:
    """Measure every scheme that has not been."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    model = transformers.AutoModel.from_pretrained(arguments.source, dtype=torch.float32).eval()
    pooling = read_pooling(arguments.source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.source)
    texts = sentences(tokenizer, read_text(arguments.text).splitlines(), arguments.tokens, pooling.longest)
    counts = {"texts": len(texts), "tokens": sum(ids.numel() for ids in texts)}
    file = result_files.result_file("scaling_sentences", arguments.source.resolve().name)
    rows = result_files.merge(file, [], KEYS)
    done = {tuple(row[key] for key in KEYS) for row in rows}
    left = [scheme for scheme in SCHEMES if (*scheme, *counts.values()) not in done]
    expected = embeddings(model, texts, pooling) if left else None
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    own = {name: module.weight.detach().clone() for name, module in layers.items()}
    for bits, kind, block in left:
        for name, module in layers.items():
            module.weight.copy_(dequantize_codes(*quantize_weight(own[name], bits, kind, block), block))
        assert expected is not None
        found = distances(expected, {"": embeddings(model, texts, pooling)})[0]
        row = {
            "bits": bits,
            "data_type": kind,
            "block": block,
            **counts,
            "cosine_loss": round(1 - found.cosine_mean, 7),
        }
        row |= {"largest_loss": round(1 - found.cosine_min, 7), "spearman": round(found.spearman, 5)}
        result_files.merge(file, [{**row, "same_nearest": round(found.same_nearest, 4)}], KEYS)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
