"""How the rows of a tensor differ between a checkpoint of the Hub and GGUF, and the way there and back.

llama.cpp turns neighbouring dimensions of a head together where transformers turns those of its two halves, so the rows
of such a projection stand in another order within each head. Norms that transformers keeps less one are kept whole. And
GPT-2's weights are [in, out] in a checkpoint.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What is done to a tensor.

    Attributes:
        head: the rows of a head whose halves are interleaved; 0 where they stand as they are.
        added: a number that GGUF adds.
        transposed: whether it is [in, out] in a checkpoint.

    """

    head: int = 0
    added: float = 0.0
    transposed: bool = False

    def to_gguf(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield a checkpoint's tensor as GGUF has it, from blocks of its rows."""
        # In float32: one more than a small number of 16 bits has no place in 16.
        return (
            block.float() + self.added if self.added else block for block in self._changed(blocks, (2, self.head // 2))
        )

    def from_gguf(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield a tensor of GGUF as a checkpoint has it, from blocks of its rows."""
        return (block - self.added if self.added else block for block in self._changed(blocks, (self.head // 2, 2)))

    def _changed(self, blocks: Iterable[Tensor], halves: tuple[int, int]) -> Iterator[Tensor]:
        if self.transposed:
            blocks = [torch.cat(list(blocks)).t().contiguous()]
        for block in _whole_heads(blocks, self.head) if self.head else blocks:
            if self.head:
                yield block.reshape(-1, *halves, *block.shape[1:]).transpose(1, 2).reshape(block.shape)
            else:
                yield block


def _whole_heads(blocks: Iterable[Tensor], head: int) -> Iterator[Tensor]:
    """Yield the same rows in blocks of whole heads."""
    rest: list[Tensor] = []
    for block in blocks:
        rows = torch.cat([*rest, block])
        whole = len(rows) // head * head
        if whole:
            yield rows[:whole]
        rest = [rows[whole:]]
