"""Time decoding with a Llama of 1.07 billion random parameters in k bits, in int8 and as llama.cpp's Q4_K_M.

Hidden 2048, FFN 5632, 22 layers, 32 heads, 4 KV heads, vocabulary 32000; all linear layers are quantized, the head
among them. Layers of one shape hold the same weights, each in memory of its own. The file of llama.cpp has random bytes
in the types that Q4_K_M gives to each tensor, and is run by the library in the wheel `xllamacpp`, named by `--library`,
through its C interface. All are in one process and take turns; tokens per second are the best and the median of tokens.

    python benchmarks/kbit_generate.py [--threads N] [--bits K ...] [--library xllamacpp.abi3.so] [--rounds N]
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from llmint8.formats import KBit
from llmint8.runtime import Int8Linear, KBitLinear

CONFIG = transformers.LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)
Step = Callable[[int], Any]  # a token -> whatever


def quantize(linear: nn.Linear, bits: int) -> nn.Module:
    """Return a layer of so many bits; 0 is int8."""
    if bits:
        return KBitLinear.from_linear(linear, KBit(bits, "float", 64))
    layer = Int8Linear.from_linear(linear, torch.empty(0, dtype=torch.int64))
    layer.configure(activation="zeropoint", activation_group="row")
    return layer


@torch.no_grad()
def model_of(bits: int) -> Any:
    """Return a model whose layers have so many bits; 0 is int8."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    made: dict[tuple[int, int], nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
            if shape not in made:
                made[shape] = quantize(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16), bits)
            model.set_submodule(name, deepcopy(made[shape]))
        elif next(module.children(), None) is None:
            module.to_empty(device="cpu", recurse=False)
            for parameter in module.parameters():
                parameter.normal_()
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(CONFIG)
    return model


def by_us(bits: int) -> Callable[[], Step]:
    """Return what starts a sequence in a model of ours."""
    model = model_of(bits)

    def start() -> Step:
        cache = transformers.DynamicCache(config=CONFIG)

        @torch.inference_mode()
        def step(token: int) -> Any:
            found = model(torch.tensor([[token]]), past_key_values=cache)
            return int(found.logits[0, -1].argmax())

        return step

    return start


def write_gguf(file: Path) -> None:
    """Write the model of random bytes in the types of Q4_K_M."""
    import gguf

    writer, kind = gguf.GGUFWriter(str(file), "llama"), gguf.GGMLQuantizationType
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    random, layers = np.random.default_rng(0), CONFIG.num_hidden_layers

    def add(name: str, rows: int, columns: int, large: bool) -> None:
        """Blocks of 256: Q6_K is 208 bytes and a float16, Q4_K two of these and 140 bytes."""
        size, at = (210, (208,)) if large else (144, (0, 2))
        data = random.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
        for place in at:
            data[:, :, place : place + 2] = np.array([1e-4], np.float16).view(np.uint8)
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kind.Q6_K if large else kind.Q4_K)

    hidden, inner, vocabulary = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size
    narrow = hidden // CONFIG.num_attention_heads * CONFIG.num_key_value_heads
    add("token_embd.weight", vocabulary, hidden, False)
    add("output.weight", vocabulary, hidden, True)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(layers):
        more = i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2  # as llama.cpp has it for Q4_K_M
        for name, rows, columns, large in (
            ("attn_q", hidden, hidden, False),
            ("attn_k", narrow, hidden, False),
            ("attn_v", narrow, hidden, more),
            ("attn_output", hidden, hidden, False),
            ("ffn_gate", inner, hidden, False),
            ("ffn_up", inner, hidden, False),
            ("ffn_down", hidden, inner, more),
        ):
            add(f"blk.{i}.{name}.weight", rows, columns, large)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Opaque(ctypes.Structure):
    """Parameters as their defaults are, whatever they hold: larger than any of llama.cpp's structures."""

    _fields_ = (("bytes", ctypes.c_ubyte * 1024),)


def by_llama_cpp(library: Path, work: Path, threads: int) -> Callable[[], Step]:
    """Return what starts a sequence in llama.cpp."""
    write_gguf(work / "model.gguf")
    llama = ctypes.CDLL(str(library))
    for name in ("llama_model_default_params", "llama_context_default_params", "llama_batch_get_one"):
        getattr(llama, name).restype = _Opaque
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
        getattr(llama, name).restype = ctypes.c_void_p
    llama.llama_backend_init()
    path = str(work / "model.gguf").encode()
    model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
    context = ctypes.c_void_p(llama.llama_init_from_model(ctypes.c_void_p(model), llama.llama_context_default_params()))
    llama.llama_set_n_threads(context, threads, threads)

    def start() -> Step:
        llama.llama_memory_clear(ctypes.c_void_p(llama.llama_get_memory(context)), True)

        def step(token: int) -> int:
            one = (ctypes.c_int32 * 1)(token)
            status = llama.llama_decode(context, llama.llama_batch_get_one(one, 1))
            assert status == 0
            llama.llama_synchronize(context)
            return 1

        return step

    return start


def main() -> None:
    """Time all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--library", type=Path, help="xllamacpp.abi3.so")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="in a round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        variants = {"int8": by_us(0)} | {f"{bits} bits": by_us(bits) for bits in arguments.bits}
        if arguments.library:
            variants["Q4_K_M"] = by_llama_cpp(arguments.library, Path(work), arguments.threads)
        found: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(arguments.rounds + 1):
            for name, start in variants.items():
                step, token = start(), 1
                for _ in range(2):
                    step(token)
                for _ in range(arguments.tokens):
                    begin = time.perf_counter()
                    step(token)
                    if number:  # the first round warms up
                        found[name].append(1 / (time.perf_counter() - begin))
    for name, speeds in found.items():
        print(f"{name}: best {max(speeds):.1f}, median {statistics.median(speeds):.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
