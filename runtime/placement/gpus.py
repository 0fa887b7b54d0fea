"""GPUs, by name or by their memory, and what of it a model never gets."""

import re
from dataclasses import dataclass

_MIB = 1 << 20
_GIB = 1 << 30
# What nvidia-smi shows as the total, in MiB. Boards that keep the bits of their error correction in the same memory
# (T4, L4, A10G, A40, L40S) have a sixteenth less than they are sold for.
_CARDS = {
    "T4": 15_360,
    "RTX-A4000": 16_376,
    "RTX-4080": 16_376,
    "L4": 23_034,
    "A10G": 23_028,
    "RTX-3090": 24_576,
    "RTX-4090": 24_564,
    "V100-32GB": 32_768,
    "RTX-5090": 32_607,
    "A100-40GB": 40_960,
    "A40": 46_068,
    "L40S": 46_068,
    "RTX-A6000": 49_140,
    "RTX-6000-Ada": 49_140,
    "A100-80GB": 81_920,
    "H100-80GB": 81_559,
    "RTX-PRO-6000": 97_887,
    "H200": 143_771,
    "B200": 183_359,
}
# The cards of which the smallest set is looked for: what they are sold for in GB, and those that have as much as each
# other. The smallest of these counts.
COMMON = (
    (16, ("T4",)),
    (16, ("RTX-A4000", "RTX-4080")),
    (24, ("L4", "A10G")),
    (24, ("RTX-3090", "RTX-4090")),
    (32, ("V100-32GB", "RTX-5090")),
    (40, ("A100-40GB",)),
    (48, ("A40", "L40S")),
    (48, ("RTX-A6000", "RTX-6000-Ada")),
    (80, ("A100-80GB", "H100-80GB")),
    (96, ("RTX-PRO-6000",)),
    (141, ("H200",)),
    (180, ("B200",)),
)
# A process that uses CUDA has its context, the kernels and libraries it has loaded, and workspaces: some 0.5 GiB; and
# of each board the driver keeps about a hundredth (torch reports 23.7 GiB of the 24 of an RTX 3090).
CONTEXT_BYTES = _GIB // 2
DRIVER_SHARE = 0.01
_MACHINE = re.compile(r"(?:(\d+)\s*x\s*)?([a-z0-9][a-z0-9. -]*?)(?::(\d+))?", re.IGNORECASE)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*G(?:i?B)?", re.IGNORECASE)
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Gpu:
    """One GPU: what to call it, and the bytes of its memory."""

    name: str
    memory: int

    @property
    def reserved(self) -> int:
        """Bytes that the driver and the CUDA context take."""
        return CONTEXT_BYTES + int(DRIVER_SHARE * self.memory)


def card(name: str) -> Gpu:
    """Return a card of the table."""
    return Gpu(name, _CARDS[name] * _MIB)


def parse_machine(text: str) -> list[Gpu]:
    """Return the GPUs of a machine: `8x24GB`, `A100-80GB:4`, `T4`, or several of these with commas between.

    A size alone is taken in GiB, as the makers of GPUs count.

    Raises:
        ValueError: it is something else, or no card that is known.

    """
    gpus: list[Gpu] = []
    for item in text.split(","):
        match = _MACHINE.fullmatch(item.strip())
        if match is None or (match[1] and match[3]):
            raise ValueError(f"--gpu {text!r}: expected such as 8x24GB, A100-80GB:4 or T4")
        number = int(match[1] or match[3] or 1)
        if not 0 < number <= _MOST_GPUS - len(gpus):
            raise ValueError(f"--gpu {text!r}: {number} GPUs, expected 1 to {_MOST_GPUS}")
        gpus += [_gpu(match[2])] * number
    return gpus


def _gpu(name: str) -> Gpu:
    if memory := _MEMORY.fullmatch(name):
        return Gpu(f"{memory[1]} GB", int(float(memory[1]) * _GIB))
    wanted = _bare(name)
    exact = [known for known in _CARDS if _bare(known) == wanted]
    found = exact or [known for known in _CARDS if _bare(known).startswith(wanted)]
    if len(found) != 1:
        which = "several" if found else "none"
        raise ValueError(f"--gpu: {name!r} is {which} of {', '.join(found or _CARDS)}; its memory does too, as 24GB")
    return card(found[0])


def _bare(name: str) -> str:
    """Return a name without what is left out when people speak of it."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|rtx", "", name.lower()))
