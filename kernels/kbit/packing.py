"""Codes of k bits, packed: k bits on the disk, and read with wide loads.

A row is cut into chunks of 64 codes, the last one filled up with zeros; a chunk takes 8 k bytes. k is a sum of powers
of two, 8 = 8, 7 = 4 + 2 + 1, 6 = 4 + 2, 5 = 4 + 1, 4 = 4, 3 = 2 + 1: of each code the lowest bits go to a plane of the
first width, the next ones to one of the second, and the planes of a chunk follow each other. A plane of w bits has 8 w
bytes, and byte j holds, from its lowest bits up, those of the codes j, j + 8 w, j + 16 w and so on. So one shift, the
same for whole runs of bytes, and one mask give many codes in their order: no code lies across two bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64


def row_bytes(in_features: int, bits: int) -> int:
    """Return the bytes that K codes of k bits take."""
    return -(-in_features // CHUNK) * 8 * bits


def planes(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the width of each plane of k bits, and by how many bits the codes are shifted for it."""
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, shift
            shift += width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [N, K], each below 2 ** bits: uint8 [N, row_bytes]."""
    n, k = codes.shape
    count = -(-k // CHUNK)
    chunks = pad(codes, (0, count * CHUNK - k)).view(n, count, CHUNK)
    packed = []
    for width, shift in planes(bits):
        fields = (chunks >> shift & (1 << width) - 1).view(n, count, 8 // width, 8 * width)
        plane = fields[:, :, 0].clone()
        for place in range(1, 8 // width):
            plane |= fields[:, :, place] << place * width
        packed.append(plane)
    return torch.cat(packed, 2).view(n, count * 8 * bits)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return what was packed, uint8 [N, K]."""
    n, count = len(packed), -(-in_features // CHUNK)
    chunks = packed.view(n, count, 8 * bits)
    codes = torch.zeros(n, count, CHUNK, dtype=torch.uint8, device=packed.device)
    start = 0
    for width, shift in planes(bits):
        plane = chunks[:, :, start : start + 8 * width]
        start += 8 * width
        fields = [plane >> place * width & (1 << width) - 1 for place in range(8 // width)]
        codes |= torch.cat(fields, 2) << shift
    return codes.view(n, count * CHUNK)[:, :in_features]
