"""Checkpoints in vLLM beside others: the figures of docs/serving.md.

    python benchmarks/serving.py logits ENGINE CHECKPOINT TEXT OUT   # of the first 2,048 tokens, in windows of 512
    python benchmarks/serving.py compare REFERENCE OUT...            # mean KL of those to the first
    python benchmarks/serving.py speed CHECKPOINT [DTYPE [eager]]    # of one core in vLLM, batch 1 and 16

ENGINE is `transformers` (in float32 for a 16-bit checkpoint, else as it loads it), `llmint8` or `vllm`. vLLM and
bitsandbytes want different versions of transformers, so each engine runs in its own environment, and leaves its logits
in OUT. In vLLM they are taken from `compute_logits` of the model, which it calls for the logprobs of a prompt.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

TOKENS, WINDOW = 2048, 512
BATCHES, PROMPT, NEW = (1, 16), 128, 32


def windows(checkpoint: str, text: str) -> list[list[int]]:
    """Return the first tokens of a text, in windows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(Path(text).read_text()[: TOKENS * 20]).input_ids[:TOKENS]
    return [ids[start : start + WINDOW] for start in range(0, TOKENS, WINDOW)]


def of_model(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """Return the logits of a transformers model, float32 [tokens, vocabulary]."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([window])).logits[0].float() for window in ids])


class Watch:
    """What vLLM's worker learns: to write the logits of prompts to a file, and to take the time of its steps."""

    def count(self: Any) -> None:
        """Note the tokens of each step from now on, and the seconds that this thread works on it."""
        runner, self.steps = self.model_runner, []
        execute = runner.execute_model

        def execute_model(scheduled: Any, *more: Any, **named: Any) -> Any:
            start = time.thread_time()
            found = execute(scheduled, *more, **named)
            self.steps.append((scheduled.total_num_scheduled_tokens, time.thread_time() - start))
            return found

        runner.execute_model = execute_model

    def counted(self: Any) -> list[tuple[int, float]]:
        """Return what was noted since the last call."""
        steps = [step for step in self.steps if step[0]]
        self.steps.clear()
        return steps

    def watch(self: Any, out: str) -> None:
        """Keep what the model computes from now on."""
        model, made = self.model_runner.model, []
        compute = model.compute_logits

        def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden)
            if len(hidden) > 1:  # of a prompt, and not of the next token
                made.append(logits.float())
                torch.save(made, out)
            return logits

        model.compute_logits = compute_logits


def of_vllm(checkpoint: str, ids: list[list[int]], out: str) -> None:
    """Let vLLM's worker write its logits to `out`; those of the last position of a prompt are not asked for."""
    from vllm import LLM, SamplingParams

    how: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": False, "enforce_eager": True}
    llm = LLM(checkpoint, max_model_len=1024, worker_extension_cls="serving.Watch", **how)
    llm.collective_rpc("watch", args=(out,))
    for window in ids:
        llm.generate({"prompt_token_ids": window}, SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    made = torch.load(out)
    whole = [torch.cat([logits, logits.new_zeros(WINDOW - len(logits), logits.shape[1])]) for logits in made]
    torch.save(torch.cat(whole), out)


def logits(engine: str, checkpoint: str, text: str, out: str) -> None:
    """Write the logits of an engine to a file."""
    ids = windows(checkpoint, text)
    if engine == "vllm":
        return of_vllm(checkpoint, ids, out)
    if engine == "llmint8":
        from llmint8 import runtime

        model = runtime.load(checkpoint)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        quantized = hasattr(AutoConfig.from_pretrained(checkpoint), "quantization_config")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **({} if quantized else {"dtype": torch.float32}))
    torch.save(of_model(model.eval(), ids), out)


def compare(reference: str, *others: str) -> None:
    """Print the mean KL of each to the first, over all positions but the last of a window, and how often they agree."""
    exact = torch.load(reference).view(-1, WINDOW, torch.load(reference).shape[-1])[:, :-1].log_softmax(-1)
    for other in others:
        found = torch.load(other).view(exact.shape[0], WINDOW, -1)[:, :-1, : exact.shape[-1]].log_softmax(-1)
        kl = (exact.exp() * (exact - found)).sum(-1)
        agree = (exact.argmax(-1) == found.argmax(-1)).float().mean()
        print(f"{Path(other).name}: KL {kl.mean():.5f}, same first token {agree:.2%}")


def speed(checkpoint: str, dtype: str = "auto", mode: str = "compiled") -> None:
    """Print how many tokens vLLM reads and generates in a second of one core, whatever else the machine does."""
    from vllm import LLM, SamplingParams

    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", "0"
    )  # all work is in one thread then, and its time that of the work
    how = {"max_num_seqs": 16, "enable_prefix_caching": False, "enforce_eager": mode == "eager"}
    llm = LLM(checkpoint, dtype=dtype, max_model_len=1024, worker_extension_cls="serving.Watch", **how)
    llm.collective_rpc("count")
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        prompts = torch.randint(100, 10_000, (batch, PROMPT), generator=generator).tolist()
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        llm.generate(asked, SamplingParams(temperature=0, max_tokens=1 + NEW, ignore_eos=True), use_tqdm=False)
        (steps,) = llm.collective_rpc("counted")
        read = statistics.median(seconds / tokens for tokens, seconds in steps if tokens > batch)
        made = statistics.median(seconds / tokens for tokens, seconds in steps if tokens == batch)
        what = f"reads {1 / read:.0f}, generates {1 / made:.1f} tokens/s"
        print(f"{Path(checkpoint).name} {dtype} {mode}: batch {batch}: {what}", flush=True)


if __name__ == "__main__":
    {"logits": logits, "compare": compare, "speed": speed}[sys.argv[1]](*sys.argv[2:])
