"""Train a family of models and repeat on it what "The case for 4-bit precision" says of k-bit weights.

    python benchmarks/scaling_family.py TEXT --models DIR [--steps 800] [--widths 64,128,192,256] [--train]

TEXT is a text of a megabyte, such as the validation split of WikiText-2. Four widths of one Llama are trained on the
bytes of its first nine tenths, for minutes on two cores, and saved into DIR in float16; those that are there are taken
as they are. On the last tenth `llmint8 scaling` measures every precision, data type and block size, in DIR too, where
it goes on after an interruption. What the paper says is then looked up in the numbers, and what they say of it goes to
`results/scaling_family.json`, and the page beside it.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

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


def main() -> None:
    """Train, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--widths", default="64,128,192,256")
    parser.add_argument("--train", action="store_true", help="stop when they are trained")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    for width in map(int, arguments.widths.split(",")):
        directory = arguments.models / f"width-{width}"
        if not (directory / "config.json").exists():
            train(directory, width, text[:cut], arguments.steps)


if __name__ == "__main__":
    main()
