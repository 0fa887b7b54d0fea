"""Config and tokenizer of a GGUF file, as transformers' reader makes them, and what it leaves out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from llmint8.formats import SourceError
from llmint8.formats.containers.gguf.header import GgufHeader

from ..model.build import model_class, quiet_transformers
from ..words import first_line
from .dialects import Dialect
from .facts import ROPE_FREQUENCIES, rope
from .frequencies import llama_3_parameters
from .splits import split_of_name
from .vocabulary import TOKENIZER_NAME

_NAME, _EMBEDDING = "model.gguf", "token_embd.weight"
# Llama 3.1 and 3.2: by what they scale.
_LLAMA_3_FACTORS = (8.0, 32.0)
# Models of Gemma whose queries are scaled by the width of a head as it would be, by their number of layers.
_GEMMA_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# transformers' reader of these names has their splits, too.
_ALSO_KNOWN = ("default", "llama3", "llama-v3", "gpt-4o", "llama4", "qwen35")


def made_config(header: GgufHeader, dialect: Dialect) -> Any:
    """Return the PreTrainedConfig of a file. Raises SourceError: it says what no config of transformers can say."""
    with _alone(header.path) as folder:
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=_NAME, local_files_only=True)
        except Exception as error:  # of what a stranger's file says, anything may be raised
            raise SourceError(f"{header.path}: transformers reads no config from it: {first_line(error)}") from None
    if config.model_type not in dialect.model_types:
        raise SourceError(f"{header.path}: transformers takes it for a {config.model_type}")
    for name, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, name, _shortest(value))
    config.dtype = torch.float32
    if (embedding := header.tensors.get(_EMBEDDING)) is not None:
        config.vocab_size = embedding.shape[0]
    head_dim = header.facts.get(f"{dialect.name}.attention.key_length")
    if head_dim is not None and hasattr(config, "head_dim"):
        config.head_dim = head_dim
    if dialect.name in _GEMMA_BY_WIDTH:
        width = config.hidden_size // config.num_attention_heads
        by_width = config.num_hidden_layers == _GEMMA_BY_WIDTH[dialect.name]
        config.query_pre_attn_scalar = width if by_width else config.head_dim
    if hasattr(config, "attention_bias"):
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
    if hasattr(config, "mlp_bias"):
        config.mlp_bias = "blk.0.ffn_up.bias" in header.tensors
    _scale_positions(header, dialect, config)
    cls = model_class(config)
    config.architectures = None if cls is None else [cls.__name__]
    for title in ("_name_or_path", "_model_name_or_path"):  # it is neither a path nor a repo
        config.__dict__.pop(title, None)
    return config


def _shortest(value: float) -> float:
    """Return the number that a float32 was written as, where that is what it is."""
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value


def _scale_positions(header: GgufHeader, dialect: Dialect, config: Any) -> None:
    """Scale the rotary positions as the file says, which transformers' reader does not."""
    said = {name.rpartition(".")[2]: header.facts[name] for name in header.facts if ".rope.scaling." in name}
    kind = said.get("type", "linear" if said.get("factor") else "none")
    parameters = rope(config)
    if ROPE_FREQUENCIES in header.tensors:
        parameters |= llama_3_parameters(header, config, _LLAMA_3_FACTORS)
    elif kind == "linear" or kind == "yarn":
        parameters |= {"rope_type": kind, "factor": said["factor"]}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = said["original_context_length"]
    elif kind != "none":
        raise SourceError(f"{header.path}: its rotary positions are scaled as {str(kind)[:40]!r}, which is not known")
    else:
        return
    whole = dict(config.rope_parameters or {})
    config.rope_parameters = {**whole, "full_attention": parameters} if "full_attention" in whole else parameters


def made_tokenizer(header: GgufHeader, home: Path) -> list[str]:
    """Put the tokenizer of a file into a directory that has none, and return what there is to say."""
    if (home / TOKENIZER_NAME).exists():
        return []
    if header.facts.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return []
    with _alone(header.path) as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_NAME, local_files_only=True)
            tokenizer.save_pretrained(home)
        except Exception as error:
            return [f"no tokenizer: transformers makes none of the file's: {first_line(error)}"]
    split = str(header.facts.get("tokenizer.ggml.pre", "default"))
    if header.facts["tokenizer.ggml.model"] != "gpt2" or split in _ALSO_KNOWN:
        return []
    known = split_of_name(split)
    if known is None:
        return [f"the tokenizer splits text as GPT-2's does, where the file says {split[:40]!r}"]
    file = home / TOKENIZER_NAME
    made = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(made | {"pre_tokenizer": known}, ensure_ascii=False), encoding="utf-8")
    return []


@contextmanager
def _alone(path: Path) -> Iterator[str]:
    """Show transformers a directory with nothing but the file: it looks for others, and would take them."""
    with TemporaryDirectory(prefix="llmint8-") as folder, quiet_transformers(level=40):
        (Path(folder) / _NAME).symlink_to(path.resolve())
        yield folder
