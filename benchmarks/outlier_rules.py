"""Compare rules for outlier columns on two architectures: KL to the 16-bit model at the same number of columns.

    python benchmarks/outlier_rules.py CHECKPOINT TEXT

CHECKPOINT is a 16-bit model with a tokenizer (SmolLM2 in `docs/accuracy.md`), TEXT a long text it was not calibrated
on. The second model is made here: a small OPT (LayerNorm, ReLU, biases, learned positions), trained for some minutes on
the first four fifths of TEXT and then given outliers that leave its function alone: the scale of each channel is
multiplied by a log-normal factor in front of a linear layer and divided by it inside, with another spread for each
layer. Calibration is the packaged text for both. The rules: no columns, the same number for every layer by largest
magnitude, the budget split by measured error (the converter's own), and the paper's fixed threshold.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.calibration import calibrator
from llmint8.runtime.accuracy.evaluate import measure, token_windows

# A spread for each kind of input in each block: attention, attention output, first and second linear of the MLP.
SPREADS = [(1.2, 0.2, 0.6, 1.0), (0.3, 0.8, 1.3, 0.5), (0.8, 0.3, 0.3, 1.6), (0.2, 0.6, 0.9, 0.7), (0.6, 0.2, 0.4, 2.0)]
WIDTH, VOCABULARY, LENGTH = 256, 2048, 256


def make_opt(directory: Path, text: str, steps: int) -> None:
    """Train the small OPT, plant outliers, and save it with its tokenizer in float16."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(), vocab_size=VOCABULARY, show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(directory)
    ids = torch.tensor(tokenizer.encode(text).ids)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=len(SPREADS),
        num_attention_heads=4,
        max_position_embeddings=512,
        dropout=0.0,
    )
    model = transformers.OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, step / 30) * (1 - step / steps) + 1e-5
        starts = torch.randint(len(ids) - LENGTH, (8,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"OPT trained for {steps} steps, loss {loss.item():.2f}", flush=True)
    plant(model)
    model.half().save_pretrained(directory)


@torch.no_grad()
def plant(model: Any) -> None:
    """Give every linear input channels of very different scales, with the function of the model unchanged."""
    for block, (attention, output, first, second) in zip(model.model.decoder.layers, SPREADS, strict=True):
        mixer = block.self_attn
        for before, layers, width, spread in (
            (block.self_attn_layer_norm, [mixer.q_proj, mixer.k_proj, mixer.v_proj], WIDTH, attention),
            (mixer.v_proj, [mixer.out_proj], WIDTH, output),
            (block.final_layer_norm, [block.fc1], WIDTH, first),
            (block.fc1, [block.fc2], 4 * WIDTH, second),  # through a ReLU, which commutes with positive factors
        ):
            gains = torch.exp(torch.randn(width) * spread)
            before.weight.mul_(gains if before.weight.ndim == 1 else gains[:, None])
            before.bias.mul_(gains)
            for layer in layers:
                layer.weight.div_(gains)


def uniform(groups: Any, criterion: Any) -> list[int]:
    """Give every layer the same number of columns."""
    return [min(int(criterion.value), len(group.dims)) for group in groups]


def logits(model: Any, ids: Tensor) -> Callable[[slice], Tensor]:
    """Return what gives the logits at positions of a window."""
    found = model(ids[None]).logits[0]
    return lambda places: found[places]


@torch.no_grad()
def compare(source: Path, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Convert with every rule and measure each result."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for rule in ("none", "uniform top-k=16", "top-k=8", "top-k=16", "threshold=6.0"):
            out = Path(directory) / rule
            select = uniform if rule.startswith("uniform") else calibrator.select
            with patch.object(calibrator, "select", select):
                report = converter.convert(source, out, outliers=rule.removeprefix("uniform "))
            for activation in ("absmax", "zeropoint"):
                model = runtime.load(out, dtype=torch.float32, activation=activation)
                runs = ((ids, logits(reference, ids), {rule: logits(model, ids)}) for ids in windows)
                kl = measure(runs).measurements[0].kl_mean
                row = {"model": source.name, "rule": rule, "activation": activation, "kl": round(kl, 5)}
                rows.append({**row, "columns": round(report.outlier_share, 4)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Compare on both models and write `results/outlier_rules.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    cut = len(text) * 4 // 5
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        opt = Path(directory) / "small OPT"
        make_opt(opt, text[:cut], arguments.steps)
        for source, length, content in ((opt, LENGTH, text[cut:]), (arguments.checkpoint, 512, text)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            rows += compare(source, token_windows(tokenizer, content, arguments.windows * length, length))
    file = Path(__file__).parent / "results" / "outlier_rules.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
