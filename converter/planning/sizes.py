"""What of a plan makes OUT larger than it need be, told with the numbers."""

import dataclasses

from ..words import size
from .plan import ConversionPlan, with_selection

_HALF = "BF16"
# What is worth a word: less than this share of OUT is not.
_WORTH_TELLING = 0.05


def size_notices(plan: ConversionPlan) -> list[str]:
    """Say what `--quantize-head` adds, and what `--dtype bfloat16` would spare.

    The sizes are those of the plan: outlier columns as many as the budget has.
    """
    notices = []
    before, after = plan.bytes_before, plan.bytes_after
    in_all = f"{size(after)}, {after / before:.0%} of the source"
    if plan.untied:
        assert plan.head is not None
        heads = [name for name in plan.selection.layers if plan.selection.module_of[name] == plan.head.module]
        less = dataclasses.replace(plan, head=None)
        less = with_selection(less, plan.selection.without(dict.fromkeys(heads, "")))
        notices.append(
            f"--quantize-head adds {size(after - less.bytes_after)}: the embedding it shares stays beside it. "
            f"OUT takes {in_all}; without it {size(less.bytes_after)}"
        )
    half = with_selection(dataclasses.replace(plan, dtype=_HALF), plan.selection).bytes_after
    if plan.dtype is None and after - half > _WORTH_TELLING * after:
        notices.append(
            f"what is not quantized stays in float32, as it is in the source: OUT takes {in_all}; "
            f"with --dtype bfloat16 {size(half)}"
        )
    return notices
