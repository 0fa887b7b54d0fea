"""Load an int8 checkpoint into the ordinary transformers class.

The directory is opened and its structure checked by the formats room; transformers sees it only after that,
so an index that leads elsewhere or a header that lies never reaches it. On the CPU tensors are mapped from the files,
which must stay as they are meanwhile; but for int8 values that are laid out anew for their kernel.
"""

import logging
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from llmint8.converter.hub.resolve import resolve
from llmint8.converter.machine import return_freed_memory
from llmint8.converter.model.buffers import fill_computed, nobodys_notice
from llmint8.converter.model.build import is_named
from llmint8.converter.model.limits import bounded_modules
from llmint8.converter.model.missing import fill_missing
from llmint8.converter.model.names import module_names
from llmint8.formats import (
    DTYPES,
    Checkpoint,
    CheckpointError,
    LLMInt8Error,
    check_values,
    open_checkpoint,
    read_manifest,
)
from llmint8.formats.disk.names import MANIFEST_NAME
from llmint8.kernels.linear import is_laid_out_anew
from llmint8.kernels.reference import Activation

from ..layers.arguments import (
    ACTIVATION_GROUPS,
    ActivationGroup,
    Outliers,
    check_choice,
    check_searchable,
    group_to_run,
    outlier_mode,
    recorded_group,
    settled_dtype,
)
from ..layers.embedding import Int8Embedding, TiedHead
from ..parallel.cut import cut_of
from ..parallel.plan import settle
from .calibration import Calibration, read_calibration
from .compiled import compile_decode
from .places import check_in_one_place
from .pretrained import config_and_class, from_pretrained, int8_config
from .settings import log_summary

log = logging.getLogger("llmint8")


def load(
    path_or_repo: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    *,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    outliers: Outliers | None = None,
    threshold: float | None = None,
    activation: Activation | None = None,
    activation_group: ActivationGroup | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    compile: bool = False,
    tp_plan: Literal["auto"] | dict[str, str] | None = None,
    distributed_config: Any = None,
) -> PreTrainedModel:
    """Load an int8 checkpoint, written by llmint8 or by bitsandbytes, ready to run.

    Args:
        path_or_repo: a directory, or a repository id on the Hub.
        device: where the whole model goes; the CPU by default.
        dtype: of everything that is not int8 (`torch.float16` or `"float16"`); the checkpoint's by default.
        device_map: transformers' and accelerate's placement over several devices, instead of `device`. What it puts on
            `cpu` beside a GPU, or on `disk`, comes from there in each call, as int8; `"disk"` puts all there.
        max_memory: with `device_map="auto"`, bytes for each device, by number or as `"cpu"`.
        offload_folder: where accelerate puts what is on `disk`, where it cannot be read from the checkpoint.
        outliers: which dimensions of the inputs are multiplied in floating point: `static` those stored in
            the checkpoint, `dynamic` those with any |x| >= `threshold`, searched in every call, `none` none.
            By default `static`, and `dynamic` in layers that the calibration should have reached and did not; for a
            checkpoint of bitsandbytes what it would do.
        threshold: for `dynamic`; the checkpoint's `llm_int8_threshold` by default.
        activation: how inputs are quantized, `absmax` or `zeropoint`; what the checkpoint records by default.
        activation_group: how many consecutive dimensions of an input share a scale: 64, 128, 256, or `row` for all of
            them. By default what the checkpoint records, and `row` where it records none, or where there are no kernels
            for groups.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; that of HF_TOKEN or `hf auth login` by default, and False for none.
        trust_remote_code: run the model code in the directory, if its config.json names any.
        verify: check every value and every hash first, rules E12 to E19 too. All tensors are read once more for it,
            one at a time; that takes about as long as `llmint8 verify`.
        compile: let `generate` decode with a static cache and `torch.compile`; see `runtime/model/compiled.py`. A
            warning says so where that cannot be.
        tp_plan: spread the model over the processes that torchrun has started, each with a part of every layer: `auto`
            as transformers plans it, or rules beside these, pattern of names -> style. See `runtime/parallel/plan.py`.
        distributed_config: transformers' `DistributedConfig` in its place, with `ep_size` for whole experts.

    Returns:
        The model, in eval mode: the transformers class that the config's `architectures` names, a causal LM
        where it names none, with `Int8Linear` layers.

    Raises:
        ValueError: an argument has a value that is not one of those above.
        CheckpointError: the checkpoint breaks a rule of spec.md.
        LLMInt8Error: transformers has no such model or cannot build it, or the tensors are not those of the model.

    """
    check_choice("outliers", outliers, get_args(Outliers))
    check_choice("activation", activation, get_args(Activation))
    check_choice("activation_group", activation_group, ACTIVATION_GROUPS)
    if device is not None and device_map is not None:
        raise ValueError(f"device is {device!r} and device_map is {device_map!r}; give one of them")
    if max_memory is not None and not isinstance(device_map, str):
        raise ValueError(f"max_memory is for device_map='auto' and the like, which is {device_map!r}")
    parallel = settle(tp_plan, distributed_config, device, device_map)
    checkpoint = open_checkpoint(resolve(path_or_repo, revision, "int8", token=token).path)
    mode, threshold = outlier_mode(checkpoint.quantization, outliers, threshold)
    for scheme in checkpoint.quantization.schemes.values():
        check_searchable(mode, scheme.rotation, scheme.kbit)
        if parallel is not None and scheme.kbit is not None:
            raise LLMInt8Error(f"{checkpoint.path}: layers of k bits are not cut; load it without tp_plan")
    if verify and (problems := check_values(checkpoint)):
        more = f"; and {len(problems) - 1} more, which llmint8 verify lists" if problems[1:] else ""
        raise CheckpointError(problems[0].code, str(problems[0]).removeprefix(f"{problems[0].code} ") + more)
    config, cls = config_and_class(checkpoint, trust_remote_code)
    if not is_named(config, cls):
        named = config.architectures[0]
        log.warning("%s: transformers has no %r: taken for its %s", checkpoint.path, named, cls.__name__)
    dtype = settled_dtype(dtype, checkpoint, config)
    manifest = read_manifest(checkpoint.path) if (checkpoint.path / MANIFEST_NAME).exists() else None
    needed = mode == "static" or dtype == torch.float16
    calibration = read_calibration(checkpoint, manifest if needed else None)
    # What LLM.int8() would do is the least that a layer gets; a threshold of 0 means that nothing is an outlier. Inputs
    # that are rotated do better without a search.
    searches = outliers is None and mode == "static" and threshold and checkpoint.layout.searches
    searched = calibration.missed if searches else frozenset()
    config.quantization_config = {
        **int8_config(checkpoint),
        "outliers": mode,
        "threshold": threshold,
        "activation": activation or checkpoint.quantization.scheme.activation,
        "activation_group": activation_group or _recorded_or_row(checkpoint, device, device_map),
        "searched": searched,
        "manifest": manifest,
        "parallel": parallel,
    }
    if device is not None:
        device_map = {"": torch.device(device)}
    placement: dict[str, Any] = {"device_map": {"": "disk"} if device_map == "disk" else device_map}
    placement |= {"max_memory": max_memory} if max_memory is not None else {}
    placement |= {"offload_folder": str(offload_folder)} if offload_folder is not None else {}
    placement |= {} if parallel is None else {"distributed_config": parallel.config}
    with bounded_modules(len(checkpoint.tensors)):
        model, missing = from_pretrained(cls, checkpoint, config, dtype=dtype, **placement)
        missing, spared = fill_missing(model, missing)
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise LLMInt8Error(f"{checkpoint.path}: {missing[0]}{more}: missing, {cls.__name__} needs it")
        names = module_names(model, checkpoint.tensors)
        fill_computed(model, set(names.values()))
    if spared:
        log.warning("%s: %s", checkpoint.path, spared)
    if nobodys := nobodys_notice(model, set(names.values())):
        log.warning("%s", nobodys)
    _prepare(model, checkpoint, names, calibration)
    log_summary(model)
    if compile:
        compile_decode(model)
    return model


def _recorded_or_row(checkpoint: Checkpoint, device: torch.device | str | None, device_map: Any) -> ActivationGroup:
    if device_map is not None:
        return recorded_group(checkpoint.quantization)
    return group_to_run(checkpoint.quantization, torch.device(device or "cpu"), str(checkpoint.path))


def _prepare(model: Any, checkpoint: Checkpoint, names: dict[str, str], calibration: Calibration) -> None:
    """Let every layer prepare its weight, and give it its limit.

    Pages of a mapped file stay in memory once read. So where values are laid out anew, or anything was cast, the layers
    let go of the file and read their values into memory of their own. What accelerate moves stays as it is.
    """
    layers = {
        record: model.get_submodule(names[f"{record}.weight"].removesuffix(".weight"))
        for record in checkpoint.records
        if f"{record}.weight" in names  # experts of other processes are not
    }
    cast = _was_cast(model, checkpoint, names)
    here = [
        record
        for record, layer in layers.items()
        if layer.row_absmax.device.type == "cpu" and not hasattr(layer, "_hf_hook") and cut_of(layer) is None
    ]
    own = {record for record in here if cast or is_laid_out_anew(layers[record].stored())}
    heads = {module.table: module for module in model.modules() if isinstance(module, TiedHead)}
    for table in heads:
        check_in_one_place(table.name, getattr(model, "hf_device_map", None))
    # First all of them: until then the file stays mapped.
    for record in own:
        layers[record].weight = None
        for name, buffer in layers[record].named_buffers():
            setattr(layers[record], name, buffer.clone())
    for record, layer in layers.items():
        if record in own:
            return_freed_memory()
            layer.weight = nn.Parameter(checkpoint.read(f"{record}.weight"), requires_grad=False)
        try:
            layer.prepare()
        except ValueError as error:
            raise CheckpointError("E14", f"{checkpoint.path}: {record}: {error}") from None
        if isinstance(layer, Int8Embedding):
            if layer not in heads:
                continue
            layer = heads[layer]
            layer.prepare()
        layer.kept_limit = calibration.limit(record, layer)
    halves = {record for record, layer in layers.items() if layer.dtype == torch.float16}
    if notice := calibration.overflow(halves):
        log.warning("%s", notice)


def _was_cast(model: Any, checkpoint: Checkpoint, names: dict[str, str]) -> bool:
    """Tell whether a tensor of the model is of another dtype than in the file."""
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return any(
        dtypes.get(name) not in (None, DTYPES[checkpoint.tensors[stored].dtype]) for stored, name in names.items()
    )
