"""What a converted model must do, tried on a tiny one of each family; `write_architectures.py` writes down how it went.

The model in float32 is the control: what it does not do, the int8 one need not, and how far it is from itself, when it
goes the same way twice, is allowed. In the document such a place says why.

How far the logits may be from those in float32: rounding to 127 steps of the largest of K numbers that are normally
distributed, 2.4 standard deviations for K = 64, is wrong by 2.4 / 127 / sqrt(12) = 0.55 % of their size, and weight and
input are both rounded: 0.77 % for each layer, and for L of them, one after the other, sqrt(L) times that, where nothing
makes it larger. Norms, products of two layers and gates do. `ROOM` is what is left for these.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

from llmint8 import converter, runtime
from llmint8.converter.model.inputs import runs
from llmint8.formats import check_values, open_checkpoint

ROOT = Path(__file__).parents[1]
LAYER_ERROR, ROOM = 2**0.5 * 2.4 / 127 / 12**0.5, 4.0
# Sums in another order, and here and there a number that falls on the other side of a step.
SAME = 0.01
_NEW, _BEAMS, _PAD = 6, 3, 1
CHECKS = {"cache": "cache", "beams": "beam search", "padding": "padded batch", "saved": "saved, loaded again"}


def beside(path: Path) -> ModuleType:
    """Import a module by its file: neither `soak` nor `tests` is a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architectures = beside(ROOT / "tests" / "architectures.py")
families = beside(ROOT / "soak" / "families.py")


@dataclass(frozen=True)
class Result:
    """What came of one family.

    Attributes:
        name, model: its name in the table, and its class.
        layers, kept: how many linear layers are int8, and how many stay 16 bit because the model's code uses them.
        error: the relative error of the logits, Frobenius norm.
        checks: name of a check -> "yes", or why not; of a check that does not apply nothing.
        failed: names of the checks, and `logits`, where it does worse than it should.

    """

    name: str
    model: str
    layers: int
    kept: int
    error: float
    checks: dict[str, str]
    failed: tuple[str, ...]


def bound(name: str, layers: int) -> float:
    """Return what the error of a family's logits must not exceed."""
    more, _ = families.LUCK.get(name, (1.0, ""))
    return float(ROOM * LAYER_ERROR * layers**0.5 * more)


def conform(name: str, folder: Path) -> Result:
    """Convert a tiny model of a family in an empty folder, and try all that a converted model must do."""
    model = architectures.tiny_model(name)
    architectures.save(model, folder / "source")
    plain = type(model).from_pretrained(folder / "source", dtype=torch.float32).eval()
    control, expected = _behaviour(plain, name), architectures.outputs(plain)
    report = converter.convert(folder / "source", folder / "out", jobs=1)
    loaded = runtime.load(folder / "out", dtype=torch.float32)
    found = _behaviour(loaded, name)
    error = _apart(architectures.outputs(loaded), expected)
    checks = {check: _verdict(found[check], control[check]) for check in found}
    checks["saved"] = _saved(folder)
    failed = [check for check, verdict in checks.items() if verdict.startswith("**")]
    kept = sum("own code" in reason for reason in report.kept.values())
    failed += ["logits"] if not error <= bound(name, report.layers) else []
    return Result(name, type(model).__name__, report.layers, kept, error, checks, tuple(failed))


def _verdict(found: float | str, control: float | str) -> str:
    if isinstance(control, str):
        return f"not in 16 bit either: {control}"
    if isinstance(found, str):
        return f"**{found}**"
    if not found <= SAME + control:
        return f"**apart by {found:.2g}**"
    return "yes" if control <= SAME else f"as in 16 bit, {control:.2g} apart"


def _behaviour(model: Any, name: str) -> dict[str, float | str]:
    """Try what a model does in more than one way; return how far apart the ways are, or what it raised."""
    tokens = torch.randint(4, 256, (2, 16), generator=torch.Generator().manual_seed(5))
    found: dict[str, float | str] = {}
    if model.can_generate():
        inputs = {"input_ids": tokens} if name in families.TEXT else _inputs(model, tokens)
        found["cache"] = _tried(_with_cache, model, inputs)
        found["beams"] = _tried(_with_beams, model, inputs)
    if name in families.TEXT:
        found["padding"] = _tried(_padded, model, tokens)
    return found


def _tried(check: Callable[..., float], *arguments: Any) -> float | str:
    try:
        return check(*arguments)
    except Exception as error:  # whatever the model's code raises
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:60]}"


def _inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the images or sounds, and the text, of which the model can go on."""
    found: dict[str, Tensor] = {}
    for _, method, arguments in runs(model, tokens):
        if method == "forward":
            found = {key: value for key, value in arguments.items() if not key.startswith("decoder_")}
            if not isinstance(_tried(_with_cache, model, found), str):
                break
    return found


def _generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    own = model.generation_config
    first = {key: getattr(own, key, None) for key in ("decoder_start_token_id", "bos_token_id")}
    if model.config.is_encoder_decoder and first["decoder_start_token_id"] is None:
        first["decoder_start_token_id"] = 2
    settings = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": _PAD, "eos_token_id": None, **first}
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "length_penalty": 0.0}
    model.generation_config = GenerationConfig(**settings, **asked, **options)  # what the model asks for besides, goes
    torch.manual_seed(2)  # some models draw numbers on the way
    with torch.no_grad():
        return model.generate(**inputs, generation_config=model.generation_config)


def _logits(model: Any, inputs: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """Return the logits of the new tokens of sequences, from one call without a cache."""
    own = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    torch.manual_seed(2)
    with torch.no_grad():
        logits: Tensor = model(**{**inputs, own: sequences[:, :-1]}).logits
    return logits[:, -_NEW:].float()


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _with_cache(model: Any, inputs: dict[str, Tensor]) -> float:
    """Compare the logits of tokens generated one by one with those of all at once."""
    out = _generated(model, inputs)
    return _apart(torch.stack(out.logits, 1).float(), _logits(model, inputs, out.sequences))


def _with_beams(model: Any, inputs: dict[str, Tensor]) -> float:
    """Compare the score of the best beam with that of its tokens all at once, in nats for a token."""
    out = _generated(model, inputs, num_beams=_BEAMS)
    scores = _logits(model, inputs, out.sequences).log_softmax(-1)
    scores = scores.gather(2, out.sequences[:, -_NEW:, None]).sum((1, 2))
    return float((scores - out.sequences_scores).abs().max()) / _NEW


def _padded(model: Any, tokens: Tensor) -> float:
    """Compare rows of unlike length in one batch with each by itself: the first of what follows, or all of it."""
    lengths = [tokens.shape[1] // 2 + 1, tokens.shape[1]]
    left = model.can_generate() and not model.config.is_encoder_decoder
    batch, mask = torch.full_like(tokens, _PAD), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        place = slice(-length, None) if left else slice(length)
        batch[row, place], mask[row, place] = tokens[row, :length], 1

    def out(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask}
        if model.can_generate():
            first: Tensor = _generated(model, given).logits[0]
            return first
        with torch.no_grad():
            found: Tensor = tree_leaves(model(**given))[0]
        return found

    together, distances = out(batch, mask), []
    for row, length in enumerate(lengths):
        alone = out(tokens[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
        both = together[row : row + 1]
        distances.append(_apart(both[:, :length] if both.ndim == 3 else both, alone))
    return max(distances)


def _saved(folder: Path) -> str:
    """Save the loaded model, verify and load it: the outputs must be the same bits."""
    try:
        model = runtime.load(folder / "out", dtype=torch.float32)
        expected = architectures.outputs(model)
        model.save_pretrained(folder / "saved")
        if problems := check_values(open_checkpoint(folder / "saved")):
            return f"**{problems[0]}**"
        again = architectures.outputs(runtime.load(folder / "saved", dtype=torch.float32))
    except Exception as error:
        return f"**{type(error).__name__}: {error}**"
    return "yes" if torch.equal(again, expected) else f"**apart by {_apart(again, expected):.2g}**"
