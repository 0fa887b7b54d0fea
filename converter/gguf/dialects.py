"""The architectures of llama.cpp that are read or written here: what their tensors are called, how their rows stand.

The names come from gguf-py. What llama.cpp changes beside them is said here, an architecture a line, and each line has
been compared with transformers' reader of GGUF on a model of its own. Another architecture is refused by its name, for
weights in another order load anywhere and are noise.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmint8.formats import LLMInt8Error
from llmint8.formats.containers.gguf.library import gguf_py
from llmint8.formats.containers.gguf.rows import Rows


@dataclass(frozen=True)
class Dialect:
    """An architecture.

    Attributes:
        name: what llama.cpp calls it.
        model_types: what transformers calls models of it; the first is what a file is read as.
        pairs: whether the halves of the heads of q and k are interleaved.
        norms: what norms are larger by than in a checkpoint.
        transposed: whether a checkpoint has [in, out].
        written: whether all is known that llama.cpp wants to be told, so that it can be exported.

    """

    name: str
    model_types: tuple[str, ...]
    pairs: bool = False
    norms: float = 0.0
    transposed: bool = False
    written: bool = False

    def rows(self, name: str, shape: tuple[int, ...], config: Any) -> Rows:
        """Return what is done to a tensor of GGUF, by its name there."""
        leaf = re.sub(r"^blk\.\d+\.", "", name)
        if self.pairs and leaf.startswith(("attn_q.", "attn_k.")):
            heads = config.num_attention_heads if leaf.startswith("attn_q.") else config.num_key_value_heads
            return Rows(head=shape[0] // heads)
        if self.norms and leaf.endswith("norm.weight"):
            return Rows(added=self.norms)
        matrix = leaf in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
        return Rows(transposed=self.transposed and matrix)

    def names(self, tensors: Iterable[str], layers: int) -> dict[str, str]:
        """Return for each tensor of a checkpoint what GGUF calls it; left out are those that it does not know."""
        gguf = gguf_py()
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        known = gguf.get_tensor_name_map(arch, layers)
        found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
        return {name: str(there) for name, there in found.items() if there is not None}


DIALECTS = (
    Dialect("llama", ("llama", "mistral"), pairs=True, written=True),
    Dialect("qwen2", ("qwen2",), written=True),
    Dialect("qwen3", ("qwen3",), written=True),
    Dialect("gemma3", ("gemma3_text",), norms=1.0, written=True),
    Dialect("gemma2", ("gemma2",), norms=1.0),
    Dialect("starcoder2", ("starcoder2",)),
    Dialect("phi3", ("phi3",)),
    Dialect("stablelm", ("stablelm",)),
    Dialect("gpt2", ("gpt2",), transposed=True),
)


def dialect_of(architecture: str, where: object) -> Dialect:
    """Return the dialect of a file. Raises LLMInt8Error: it is not one of those that are known."""
    found = next((dialect for dialect in DIALECTS if dialect.name == architecture), None)
    if found is None:
        known = ", ".join(dialect.name for dialect in DIALECTS)
        raise LLMInt8Error(f"{where}: its architecture is {architecture[:80]!r}; read are {known}")
    return found


def dialect_for(config: Mapping[str, Any], where: object) -> Dialect:
    """Return the dialect that a model is written in. Raises LLMInt8Error: it is not one of those that are known."""
    model_type = str(config.get("model_type"))
    found = next((dialect for dialect in DIALECTS if dialect.written and model_type in dialect.model_types), None)
    if found is None:
        known = ", ".join(name for dialect in DIALECTS if dialect.written for name in dialect.model_types)
        raise LLMInt8Error(f"{where}: a model of type {model_type[:80]!r} is not written as GGUF; known are {known}")
    return found
