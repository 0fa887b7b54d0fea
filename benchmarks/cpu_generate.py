"""Time decoding on the CPU, one sequence: ours and ours compiled against 16 and 32 bit and other int8 engines.

    python benchmarks/cpu_generate.py SOURCE [--int8 DIRECTORY] [--threads N] [--variants NAME ...]
    python benchmarks/cpu_generate.py llama-1b

SOURCE is a 16-bit checkpoint with a tokenizer, converted with the defaults unless `--int8` names the result. `llama-1b`
is a Llama of 1.07 billion random parameters (hidden 2048, 16 layers, FFN 8192, 32 heads, 8 KV heads, vocabulary 49152,
tied head), made in a temporary directory and converted without calibration. Variants that need bitsandbytes,
CTranslate2 or llama.cpp (llama-cpp-python and gguf; every matrix but the embedding in Q8_0) are left out where that
is not importable.

All are in one process and take turns; each generates the same number of tokens greedily, and tokens per second are the
median of the turns, from the second token on. The first turn, which compiles, is not among them. Printed, and written
to `results/cpu_generate-NAME-INSTRUCTIONS.json`: one kind of machine never replaces another.
"""

import argparse
import gc
import importlib.util
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from generation import by_transformers, steps_per_second

from llmint8 import converter, runtime
from llmint8.kernels.cpu import native

PROMPT = torch.arange(10, 18)[None]
Run = Callable[[int], list[float]]  # number of tokens -> the moment at which each came


def by_steps(steps: Callable[[int], Iterator[Any]], tokens: int) -> list[float]:
    """Take tokens from an engine that yields one after the other."""
    return [time.perf_counter() for _, _ in zip(range(tokens), steps(tokens), strict=False)]


def plain(dtype: str, source: Path, int8: Path, work: Path) -> Run:
    """The source in a floating-point type."""
    return partial(by_transformers, transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype), PROMPT)


def compiled(dtype: str, source: Path, int8: Path, work: Path) -> Run:
    """The same with the compiled loop that `runtime.load(compile=True)` sets up."""
    from llmint8.runtime.model.compiled import compile_decode

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    compile_decode(model)
    return partial(by_transformers, model, PROMPT)


def ours(compile: bool, source: Path, int8: Path, work: Path) -> Run:
    """The int8 checkpoint."""
    return partial(by_transformers, runtime.load(int8, compile=compile), PROMPT)


def bitsandbytes(source: Path, int8: Path, work: Path) -> Run:
    """The source, quantized while loading."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast, again and again
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    return partial(by_transformers, model, PROMPT)


def ctranslate2(source: Path, int8: Path, work: Path) -> Run:
    """CTranslate2's int8, output head included."""
    import ctranslate2 as ct2

    threads = torch.get_num_threads()  # importing the converter may change it
    ct2.converters.TransformersConverter(str(source)).convert(str(work / "ct2"), quantization="int8")
    torch.set_num_threads(threads)
    generator = ct2.Generator(str(work / "ct2"), device="cpu", intra_threads=threads, compute_type="int8")
    prompt = transformers.AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(PROMPT[0].tolist())
    return partial(by_steps, lambda tokens: generator.generate_tokens(prompt, max_length=tokens, end_token=[]))


def llama_cpp(source: Path, int8: Path, work: Path) -> Run:
    """llama.cpp's Q8_0, output head included."""
    from llama_cpp import Llama

    write_gguf(source, work / "model.gguf")
    threads = torch.get_num_threads()
    llama = Llama(str(work / "model.gguf"), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def steps(tokens: int) -> Iterator[int]:
        llama.reset()
        found: Iterator[int] = llama.generate(PROMPT[0].tolist(), temp=0.0)
        return found

    return partial(by_steps, steps)


def write_gguf(source: Path, file: Path) -> None:
    """Write a Llama as llama.cpp reads it: the rows of q and k in the order of its rotary embedding."""
    import gguf

    config = transformers.AutoConfig.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        data = tensor.contiguous().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if data.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(data, q8), raw_dtype=q8)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


VARIANTS: dict[str, tuple[Callable[[Path, Path, Path], Run], str | None]] = {  # and the module it needs
    "fp32": (partial(plain, "float32"), None),
    "bf16": (partial(plain, "bfloat16"), None),
    "fp16": (partial(plain, "float16"), None),
    "bf16-compiled": (partial(compiled, "bfloat16"), None),
    "ours": (partial(ours, False), None),
    "ours-compiled": (partial(ours, True), None),
    "bitsandbytes": (bitsandbytes, "bitsandbytes"),
    "ctranslate2": (ctranslate2, "ctranslate2"),
    "llama.cpp": (llama_cpp, "llama_cpp"),
}


def make_llama(directory: Path) -> None:
    """Write a Llama of 1.07 billion random parameters in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(0, 0.02)
    model.tie_weights()
    model.save_pretrained(directory)


def measure(names: list[str], tokens: int, rounds: int, source: Path, int8: Path, work: Path) -> list[dict[str, Any]]:
    """Let the variants take turns."""
    runs = {}
    for name in names:
        start = time.perf_counter()
        runs[name] = VARIANTS[name][0](source, int8, work)
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
    gc.collect()
    speeds: dict[str, list[float]] = {name: [] for name in names}
    firsts: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            moments = run(tokens)
            if number:
                speeds[name].append(steps_per_second(moments))
            else:
                firsts[name] = moments[-1] - start
    return [
        {
            "variant": name,
            "tokens_per_s": round(statistics.median(speeds[name]), 1),
            "first_turn_s": round(firsts[name], 1),
        }
        for name in names
    ]


def main() -> None:
    """Prepare, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--int8", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    importable = [name for name, (_, module) in VARIANTS.items() if not module or importlib.util.find_spec(module)]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=importable)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    variants = arguments.variants
    with tempfile.TemporaryDirectory() as directory:
        work, source = Path(directory), Path(arguments.source)
        if arguments.source == "llama-1b":
            variants = [name for name in variants if name != "ctranslate2"]  # its converter wants a tokenizer
            source = work / "llama-1b"
            make_llama(source)
        int8 = arguments.int8 or work / "int8"
        if arguments.int8 is None:
            options = {"outliers": "none"} if arguments.source == "llama-1b" else {}
            converter.convert(source, int8, **options)
        rows = measure(variants, arguments.tokens, arguments.rounds, source, int8, work)
    for row in rows:
        print(f"{row['variant']:14} {row['tokens_per_s']:7.1f} tokens/s   first turn {row['first_turn_s']:6.1f} s")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    machine = next((line for line in cpuinfo if line.startswith("model name")), "").partition(": ")[2]
    kind = native.kinds()[0] if native.kinds() else "none"
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "instructions": native.kinds(),
        "threads": arguments.threads,
        "model": source.name,
        "tokens": arguments.tokens,
        "rows": rows,
    }
    file = Path(__file__).parent / "results" / f"cpu_generate-{source.name}-{kind}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
