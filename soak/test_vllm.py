"""llmint8 in vLLM: servers are started, asked by the client of OpenAI, and killed. Needs vLLM: `make test-vllm`.

Models are tiny and random, in float32, so that what is compared is int8 noise and nothing else: the distribution of the
next token at every position of a prompt, all of it, and the text that is generated.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from llmint8 import converter, runtime  # noqa: E402

VOCABULARY = 96
PROMPT = "t3 t14 t15 t92 t65 t35 t89 t79 t32 t38 t46 t26 t43 t38 t32 t79"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform, so that errors show
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with some large inputs, as outliers are."""
    path = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False))
    for name, weight in model.named_parameters():
        if name.endswith("layernorm.weight"):
            weight.data[[3, 70]] = 20.0  # each rank of two has one of them
    model.bfloat16().save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0").save_pretrained(path)


@contextmanager
def serving(path: Path, *options: str, ranks: int = 1) -> Iterator[Any]:
    """Start what `vllm serve` starts, yield a client of it, and kill it with all that it has started.

    The command itself looks for a package of the name `vllm`, which is not what the one for CPUs is called.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = path / f"serve-{ranks}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "64", "--max-logprobs", "-1", "--max-num-seqs", "4"]
    command += ["--tensor-parallel-size", str(ranks), "--served-model-name", "int8", *options]
    # One core for each rank, so that none waits for another's turn.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        wait_for(client, server, log)
        yield client
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(client: Any, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 540
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(f"not ready after 9 minutes: {log.read_text()[-4000:]}")


def asked(client: Any, model: str = "int8") -> tuple[str, torch.Tensor]:
    """The text that follows the prompt, and the logarithms of all probabilities at each position but the last."""
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"prompt_logprobs": -1, "ignore_eos": True}
    )
    found = torch.full((len(PROMPT.split()) - 1, VOCABULARY), math.nan)
    for position, by_token in enumerate(answer.choices[0].prompt_logprobs[1:]):
        for token, said in by_token.items():
            found[position, int(token)] = said["logprob"]
    return answer.choices[0].text, found


def expected(model: Any, path: Path) -> tuple[str, torch.Tensor]:
    """The same of a model of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
        made = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :]), logits.log_softmax(-1)


def divergence(of: torch.Tensor, other: torch.Tensor) -> float:
    assert not other.isnan().any()
    return float((of.exp() * (of - other)).sum(-1).mean())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", ["format-1", "format-2-rotated"])
def test_a_server_says_what_the_checkpoint_says_in_llmint8(source: Path, tmp_path: Path, form: str, ranks: int) -> None:
    options: dict[str, Any] = {} if form == "format-1" else {"format": 2, "rotate": True}
    converter.convert(source, tmp_path / "int8", outliers="top-k=4", **options)
    text, here = expected(runtime.load(tmp_path / "int8", dtype="float32"), source)
    _, exact = expected(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), source)
    with serving(tmp_path / "int8", ranks=ranks) as client:
        served, there = asked(client)
    noise = divergence(exact, here)
    print(f"{form} on {ranks}: KL to 16 bit {noise:.2e} in llmint8, {divergence(exact, there):.2e} in vLLM")
    if ranks == 1:
        # The same products; what is around them adds up in another order.
        assert served.split() == text.split()
        assert divergence(here, there) < noise / 100
    else:
        # Each rank has scales of its own for its inputs.
        assert divergence(exact, there) < 2 * noise
        assert divergence(here, there) < 2 * noise


def test_experts_are_served_in_int8(tmp_path: Path) -> None:
    shape = SHAPE | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**shape, tie_word_embeddings=False, norm_topk_prob=True)
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "int8", outliers="top-k=4", format=2, rotate=True)
    model = runtime.load(tmp_path / "int8", dtype="float32")
    assert any("experts" in name for name, layer in model.named_modules() if isinstance(layer, runtime.Int8Linear))
    text, here = expected(model, tmp_path / "source")
    exact_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    _, exact = expected(exact_model, tmp_path / "source")
    noise = divergence(exact, here)
    for ranks in (1, 2):
        with serving(tmp_path / "int8", ranks=ranks) as client:
            served, there = asked(client)
        print(f"experts on {ranks}: KL to 16 bit {noise:.2e} in llmint8, {divergence(exact, there):.2e} in vLLM")
        if ranks == 1:
            assert served.split() == text.split()
            assert divergence(here, there) < noise / 100
        else:
            assert divergence(exact, there) < 2 * noise


def test_adapters_on_int8_layers_are_served(source: Path, tmp_path: Path) -> None:
    converter.convert(source, tmp_path / "int8", outliers="top-k=4")
    model = runtime.load(tmp_path / "int8", dtype="float32")
    _, exact = expected(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), source)
    plain_text, plain = expected(model, source)
    save_adapter(tmp_path / "adapter", model, ["q_proj", "v_proj", "gate_proj", "down_proj"])
    text, here = expected(model, source)
    noise = divergence(exact, plain)
    assert divergence(plain, here) > 10 * noise
    options = "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapted={tmp_path / 'adapter'}"
    with serving(tmp_path / "int8", *options) as client:
        served, there = asked(client, "adapted")
        plain_served, plain_there = asked(client)
    assert (served.split(), plain_served.split()) == (text.split(), plain_text.split())
    assert divergence(here, there) < noise / 100
    assert divergence(plain, plain_there) < noise / 100


def save_adapter(path: Path, model: Any, targets: list[str]) -> None:
    """Write a LoRA as PEFT does, and let the model compute with it."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] not in targets:
            continue
        down = torch.randn(8, layer.in_features, generator=random) * layer.in_features**-0.5
        up = torch.randn(layer.out_features, 8, generator=random) * 0.1
        tensors |= {f"base_model.model.{name}.lora_{part}.weight": half for part, half in (("A", down), ("B", up))}
        layer.register_forward_hook(lambda _, x, y, down=down, up=up: y + 2 * (x[0] @ down.t() @ up.t()))
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))


def test_layers_that_are_merged_in_the_checkpoint_and_transposed_by_vllm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=128, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "int8", outliers="top-k=4")
    text, here = expected(runtime.load(tmp_path / "int8", dtype="float32"), tmp_path / "source")
    with serving(tmp_path / "int8", "--enforce-eager") as client:
        served, there = asked(client)
    assert served.split() == text.split()
    assert divergence(here, there) < 1e-5
