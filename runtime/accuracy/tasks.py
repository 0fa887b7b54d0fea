"""Tasks of lm-evaluation-harness on an int8 checkpoint and on its 16-bit source, side by side.

The harness is a library of others (the extra `tasks`): prompts, scoring and standard errors are its own, and so are the
names of the tasks. What it is given is each model as it is stored, int8 and 16 bit, one after the other; there is never
more than one in memory. Both answer the same questions, so of most metrics more is known than two standard errors tell:
that of the difference, question by question, is reported too.
"""

import importlib.metadata
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmint8.converter.gguf.source import open_local
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.machine import return_freed_memory, usable_device
from llmint8.converter.words import first_line
from llmint8.formats import LLMInt8Error, open_checkpoint

from ..model.load import load
from .reference import load_model, reference_class, tokenizer_beside

# The zero-shot tasks of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), figure 1.
PAPER = ("winogrande", "hellaswag", "piqa", "lambada_openai")
_NOTHING_OF_ITS_OWN = ("alias", "name", "sample_len", "samples")


@dataclass(frozen=True)
class Score:
    """One metric of one task: of the 16-bit model, of the int8 model, and what lies between them."""

    task: str
    metric: str  # as the harness has it; behind a comma a filter, where there is one
    higher_is_better: bool | None
    questions: int | None
    shots: int | None
    reference: float
    reference_stderr: float | None  # the harness' own, as the next but one
    int8: float
    int8_stderr: float | None
    difference: float  # int8 - reference
    difference_stderr: float | None  # of the mean of the differences; None where the metric is no mean over questions


@dataclass(frozen=True)
class TaskComparison:
    """What `compare_on_tasks` found."""

    harness: str  # its version
    scores: list[Score]


def compare_on_tasks(
    checkpoint: str | Path,
    source: str | Path,
    names: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> TaskComparison:
    """Run tasks of lm-evaluation-harness on an int8 checkpoint and on the source it was made from.

    Args:
        checkpoint: a directory or Hub id; run as `runtime.load` runs it by default, in the dtype that it has.
        source: the 16-bit checkpoint, a directory or Hub id; its tokenizer is used.
        names: of tasks, groups and tags, `*` and `?` as in file names; paths of YAML files; or `paper`.
        include: a directory with YAML files of more tasks.
        shots: examples before each question; what the task says by default.
        limit: so many questions of each task, for a first look.
        batch: questions at a time.
        device: where both models run.
        progress: called after each model with its name and the number of models.

    Raises:
        ValueError: no such device.
        LLMInt8Error: a task is not known or its data set cannot be had; the model is not one that the harness runs; or
            one of the two is not a checkpoint.

    """
    usable_device(device)
    resolved, origin = resolve(checkpoint, kind="int8"), resolve(source, kind="source")
    open_checkpoint(resolved.path)
    opened = open_local(origin.path)
    config, cls = reference_class(opened)
    if not cls.can_generate():
        raise LLMInt8Error(f"{opened.path}: {cls.__name__} predicts no next token, which the harness' tasks need")
    tokenizer = tokenizer_beside(opened.beside, origin.path)
    with _only_errors():
        manager = TaskManager(include_path=None if include is None else str(include))
        chosen = _chosen(manager, names)
        _load_data(manager, chosen)

    def results(name: str, loaded: Callable[[], Any]) -> Mapping[str, Any]:
        model = loaded()
        try:
            with _only_errors(), _nothing_of_the_machine():
                model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
                found = evaluator.simple_evaluate(
                    model, tasks=chosen, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=True
                )
        except Exception as error:  # the harness and its tasks raise whatever they like
            raise LLMInt8Error(f"{name}: the harness failed: {first_line(error)}") from error
        del model
        return_freed_memory()
        progress(name, 2)
        kept: Mapping[str, Any] = found
        return kept

    before = results(origin.name, lambda: load_model(opened, config, cls, device, "auto"))
    after = results(resolved.name, lambda: load(resolved.path, device=device))
    return TaskComparison(importlib.metadata.version("lm_eval"), list(_scores(before, after)))


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keep the harness, `datasets` and the Hub's client from logging what is not an error; what went wrong is told."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _nothing_of_the_machine() -> Iterator[None]:
    """Keep the harness from asking git and pip about this machine: it takes seconds, git complains, nobody is told."""
    names = ("get_git_commit_hash", "add_env_info")
    before = [getattr(evaluator, name) for name in names]
    for name in names:
        setattr(evaluator, name, lambda *arguments: None)
    try:
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(evaluator, name, function)


def _chosen(manager: Any, names: Sequence[str]) -> list[str]:
    """Return the names of tasks, groups and tags that are asked for, and the paths of files.

    Raises:
        LLMInt8Error: there is no such task.

    """
    found: list[str] = []
    for name in names:
        if name == "paper":
            found += PAPER
        elif name.endswith((".yaml", ".yml")):
            path = Path(name).expanduser().absolute()
            if not path.is_file():
                raise LLMInt8Error(f"{name}: no such file; --tasks takes names and the paths of YAML files")
            found.append(str(path))
        elif matches := manager.match_tasks([name]):
            found += matches
        else:
            raise LLMInt8Error(
                f"{name}: lm-evaluation-harness has no such task; `lm-eval ls tasks` lists those it has, and "
                "--include-path DIR adds your own"
            )
    return list(dict.fromkeys(found))


def _load_data(manager: Any, names: Sequence[str]) -> None:
    """Load each task with its data set, before any model is loaded. Afterwards they come from the cache.

    Raises:
        LLMInt8Error: a task is broken, or its data set is neither in the cache nor to be fetched.

    """
    for name in names:
        try:
            manager.load([name])
        except ConnectionError as error:
            raise LLMInt8Error(
                f"{name}: its data set is not in the cache, and not to be had ({first_line(error)})"
            ) from None
        except Exception as error:  # of `datasets`, and of whatever a task's own code does
            raise LLMInt8Error(f"{name}: the task cannot be loaded: {first_line(error)}") from None


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Score]:
    for task, values in before["results"].items():
        for key, value in values.items():
            metric, _, strained = key.partition(",")
            if key in _NOTHING_OF_ITS_OWN or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            now = after["results"][task][key]
            errors = [_number(found["results"][task].get(f"{metric}_stderr,{strained}")) for found in (before, after)]
            answers = [_answers(found, task, metric, strained) for found in (before, after)]
            yield Score(
                task=task,
                metric=metric if strained in ("", "none") else f"{metric}, {strained}",
                higher_is_better=before.get("higher_is_better", {}).get(task, {}).get(metric),
                questions=before["n-samples"].get(task, {}).get("effective"),
                shots=before["n-shot"].get(task),
                reference=value,
                reference_stderr=errors[0],
                int8=now,
                int8_stderr=errors[1],
                difference=now - value,
                difference_stderr=_paired(answers[0], answers[1], value),
            )


def _number(value: Any) -> float | None:
    """Return a standard error; the harness has `N/A` where there is none."""
    return value if isinstance(value, float) else None


def _answers(found: Mapping[str, Any], task: str, metric: str, strained: str) -> dict[Any, Any]:
    """Return what each question scored, by its number."""
    samples = found.get("samples", {}).get(task, [])
    return {one["doc_id"]: one.get(metric) for one in samples if one.get("filter", strained) == strained}


def _paired(before: Mapping[Any, Any], after: Mapping[Any, Any], mean: float) -> float | None:
    """Return the standard error of the mean difference; None where the metric is no mean of what questions score."""
    if len(before) < 2 or before.keys() != after.keys():
        return None
    if not all(isinstance(one, (bool, int, float)) for one in (*before.values(), *after.values())):
        return None
    if abs(statistics.fmean(before.values()) - mean) > 1e-6 * max(1, abs(mean)):
        return None
    spread: float = statistics.stdev(after[question] - before[question] for question in before)
    return spread / math.sqrt(len(before))
