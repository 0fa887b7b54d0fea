"""The tables that `llmint8 eval` prints of what it found."""

from typing import Any

from llmint8.converter.commands.terminal import printable
from llmint8.converter.words import count


def text_table(facts: dict[str, Any]) -> str:
    """Show what was measured on a text."""
    first = "source (reference)"
    names = [printable(row["name"]) for row in facts["methods"]]
    width = max(len(first), *map(len, names))
    rows = [
        f"{'':{width}}  {'KL mean':>8}  {'median':>8}  {'99 %':>8}  {'top-1':>7}  {'perplexity':>10}  {'- ref.':>9}",
        f"{first:{width}}  {'-':>8}  {'-':>8}  {'-':>8}  {'-':>7}  {facts['reference_perplexity']:>10.3f}  {'-':>9}",
    ]
    for name, row in zip(names, facts["methods"], strict=True):
        rows.append(
            f"{name:{width}}  {row['kl_mean']:>8.5f}  {row['kl_median']:>8.5f}  {row['kl_p99']:>8.5f}  "
            f"{row['top1_agreement']:>7.2%}  {row['perplexity']:>10.3f}  {row['perplexity_difference']:>+9.3f}"
        )
    rows += [
        "",
        f"{count(facts['windows'], 'window')} of {count(facts['window'], 'token')}, "
        f"{count(facts['positions'], 'position')}. {_layers(facts)}",
    ]
    if facts["head_kl"] is not None:
        rows.append(f"The int8 output head adds {facts['head_kl']:.5f} to the mean KL.")
    return "\n".join([*rows, *_beyond(facts)])


def _layers(facts: dict[str, Any]) -> str:
    columns = f"{facts['stored_columns']:.2%} of their columns stored unquantized"
    return f"{count(facts['layers'], 'layer')} in int8, {columns}."


def _beyond(facts: dict[str, Any]) -> list[str]:
    if (beyond := facts["beyond_calibration"]) is None:
        return []
    most = f", {beyond['layer_share']:.2%} at {printable(beyond['layer'])}" if beyond["share"] else ""
    return [f"{beyond['share']:.2%} of the inputs exceed the largest of the calibration{most}."]


def embeddings_table(facts: dict[str, Any]) -> str:
    """Show how far embeddings are off."""
    names = [printable(row["name"]) for row in facts["embeddings"]]
    width = max(map(len, names))
    rows = [f"{'':{width}}  {'1 - cosine':>10}  {'largest':>8}  {'Spearman':>8}  {'same nearest':>12}"]
    for name, row in zip(names, facts["embeddings"], strict=True):
        rows.append(
            f"{name:{width}}  {1 - row['cosine_mean']:>10.6f}  {1 - row['cosine_min']:>8.6f}  {row['spearman']:>8.5f}  "
            f"{row['same_nearest']:>12.2%}"
        )
    rows += [
        "",
        f"{count(facts['texts'], 'text')} of {count(facts['tokens'], 'token')} together, pooled by "
        f"{' and '.join(facts['pooling'])}. {_layers(facts)}",
    ]
    rows += [f"{printable(folder)} is not run: what goes into it is compared." for folder in facts["left_out"]]
    return "\n".join([*rows, *_beyond(facts)])


def tasks_table(facts: dict[str, Any]) -> str:
    """Show what both models score on tasks."""
    head = ("task", "metric", "questions", "16 bit", "int8", "difference")
    rows: list[tuple[str, ...]] = [head]
    for row in facts["tasks"]:
        names = (printable(row["task"]), printable(row["metric"]), str(row["questions"] or ""))
        scores = (_with_error(row[key], row[f"{key}_stderr"]) for key in ("reference", "int8"))
        rows.append((*names, *scores, _with_error(row["difference"], row["difference_stderr"], "+")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    limit = f", the first {count(facts['limit'], 'question')} of each task" if facts["limit"] else ""
    shots = sorted({row["shots"] for row in facts["tasks"] if row["shots"] is not None})
    lines += [
        "",
        f"lm-evaluation-harness {facts['lm_eval']}, {' and '.join(map(str, shots))} examples before a question{limit}. "
        "Behind the signs stand its standard errors; that of a difference is of both models' answers to one question.",
    ]
    return "\n".join(lines)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")
