"""A model's output head and its embedding, and the model with a head of its own."""

import copy
from typing import Any, NamedTuple

from torch import nn

from llmint8.formats import SourceError

from ..model.build import is_linear, meta_model
from ..model.own_use import weights_used_directly

_EMBEDDINGS = "--quantize-embeddings"


class Head(NamedTuple):
    """A model's output head: the name of its module, and of the parameter it shares its weight with, or None."""

    module: str
    tied_to: str | None


def own_head(config: Any | None, model: Any | None, option: str = "--quantize-head") -> tuple[Any, Any, Head]:
    """Return config and model with a head that has a weight of its own, and what it was in this model.

    `option` is what asks for it, for messages.

    Raises:
        SourceError: there is no head, or the model is not the same when its head is not tied to the embedding.

    """
    head: Any = None if model is None else model.get_output_embeddings()
    modules = {} if model is None else dict(model.named_modules())
    name = next((name for name, module in modules.items() if module is head), None)
    if config is None or model is None or name is None or not is_linear(head):
        raise SourceError(f"{option}: transformers knows no plain linear output head here; leave it out")
    ties, tied_to = model.all_tied_weights_keys, None
    if pair := next((set(pair) for pair in ties.items() if f"{name}.weight" in pair), None):
        (tied_to,) = pair - {f"{name}.weight"}
        config = copy.deepcopy(config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        model = meta_model(config)
        # Encoders with decoders share one embedding among more than two, and T5 computes otherwise when it is not tied.
        if len(ties) > 1 or config.is_encoder_decoder or model is None or model.all_tied_weights_keys:
            raise SourceError(f"{option}: {config.model_type} cannot do without its tied head; leave it out")
    if weights_used_directly(meta_model(config), [name], or_its_dtype=True):
        raise SourceError(f"{option}: {config.model_type} uses the weight of {name} itself; leave it out")
    return config, model, Head(name, tied_to)


def embedding_of(config: Any | None, model: Any | None) -> tuple[Any, Any, Head | None, str]:
    """Return the name of the module that looks tokens up, and where the head is tied to it what `own_head` does.

    Raises:
        SourceError: there is none, its rows are no plain rows, or other modules have the same weight.

    """
    try:
        embedding = None if model is None else model.get_input_embeddings()
    except NotImplementedError:  # of a model that takes no tokens
        embedding = None
    modules = {} if model is None else dict(model.named_modules())
    name = next((name for name, module in modules.items() if module is embedding), None)
    if name is None or not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise SourceError(f"{_EMBEDDINGS}: transformers knows no plain embedding of tokens here; leave it out")
    weight = f"{name}.weight"
    if model is None or not any(weight in pair for pair in model.all_tied_weights_keys.items()):
        return config, model, None, name
    config, model, head = own_head(config, model, _EMBEDDINGS)
    if head.tied_to != weight or model.get_submodule(head.module).bias is not None:
        raise SourceError(f"{_EMBEDDINGS}: {head.module} has a bias, or more than the weight of {name}; leave it out")
    return config, model, head, name
