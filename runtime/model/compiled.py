"""Decode with a static cache and a compiled forward pass, through transformers' own `generate`.

The first forward pass of one token compiles, which takes from seconds to minutes; the prompt runs uncompiled. A cache
of another length (prompt plus new tokens) compiles once more, then for any length. On CUDA the pass is captured in a
graph; `generate` makes a new cache in each call, and where its memory is another the graph is captured again.

What stands in the way of compiling is looked for when the model is loaded. One warning says what it is, and
`generate` then works as without.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.configuration_utils import CompileConfig, GenerationConfig

from ..layers.experts import Int8Experts
from ..layers.linear import QuantizedLinear
from ..parallel.state import is_cut

log = logging.getLogger("llmint8")
# transformers makes JSON of its settings, to compare and to print them; a function has none.
_BACKEND = "llmint8_decode"


class CompiledGeneration(GenerationConfig):  # type: ignore[misc]
    """What `generate` does once it compiles. Saved, it is as it was: compiling belongs to this process."""

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Save what is not about compiling."""
        settings = {**self.to_dict(), "cache_implementation": None, "compile_config": None}
        GenerationConfig.from_dict(settings).save_pretrained(*arguments, **options)


def compile_decode(model: Any) -> bool:
    """Let `model.generate` decode with a compiled forward pass; tell whether it will."""
    if obstacle := _obstacle(model):
        log.warning("Not compiled, generating as without: %s", obstacle)
        return False
    if _BACKEND not in torch._dynamo.list_backends(()):
        torch._dynamo.register_backend(_backend, _BACKEND)
    config = CompileConfig(backend=_BACKEND)
    config.mode = None  # of the backend "inductor" only; see `_backend`
    config._compile_all_devices = True
    model.generation_config = CompiledGeneration.from_dict(model.generation_config.to_dict())
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = config
    return True


def is_compiled(model: Any) -> bool:
    """Tell whether `compile_decode` has set up this model."""
    config = getattr(model.generation_config, "compile_config", None)
    return config is not None and config.backend == _BACKEND


def _obstacle(model: Any) -> str | None:
    if not model.can_generate() or not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers has no static cache for {type(model).__name__}"
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    for device in (layer.row_absmax.device.type for layer in layers if layer.outliers == "dynamic"):
        if device not in ("cpu", "cuda"):
            return f"outliers='dynamic' makes tensors whose size depends on the input, on {device}"
    if any(isinstance(module, Int8Experts) for module in model.modules()):
        return "experts are run one by one, as many as a call has"
    if is_cut(model):
        return "several processes hold the model"
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        return "some layers are offloaded"
    if model.device.type == "cpu" and not _cpp_compiler():
        return "no C++ compiler found, neither CXX nor g++ nor clang++; install one"
    return None


def _cpp_compiler() -> str | None:
    """Return the compiler that torch.compile will call, as it chooses it."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor; where it cannot, say so and run the graph as it is."""
    options = {"triton.cudagraphs": True} if torch.cuda.is_available() else {}  # mode="reduce-overhead"
    try:
        compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options)
    except Exception as error:  # whatever a compiler may raise
        log.warning("Not compiled, generating as without: %s: %s", type(error).__name__, str(error).split("\n")[0])
        return graph.forward
    return compiled
