"""Graphics cards: their memory, and the part that CUDA takes before the first tensor. No torch."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.words import GIB, MIB

CONTEXT_BYTES = 501 * MIB
"""The size assumed for a CUDA context that was not measured: the largest that was (an A100, torch 2.11)."""
CUBLAS_BYTES = 8_519_680
"""cuBLAS keeps a workspace of this size per stream (``:4096:2:16:8``). Source: torch's ``CublasHandlePool``."""
CUBLAS_HOPPER_BYTES = 32 * MIB
"""The same from Hopper on; torch gives it to Blackwell too, by its pull request 175344."""
AMPERE, HOPPER = 8.0, 9.0
"""The compute capabilities from which on a card has products of bf16 and flash attention, and the larger workspace."""

PRETENDED = "pretended"
"""The CUDA of a processor that stands in for a card in tests. The card's name in its records begins so."""

OLDER_BUILD = "rm -r .venv && make setup TORCH_INDEX=ADDRESS, for CUDA 12.6 on pytorch.org's install page"
"""The command that installs a torch for older drivers and cards."""

Fits = Literal["yes", "tight", "no"]
"""Whether a run fits. Tight: torch's allocator has to give back memory that it caches, and steps are slower."""


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: The name that people use.
        memory_bytes: The total that ``nvidia-smi`` shows.
        context_bytes: The size of a CUDA context, if it was measured.
        reserve_bytes: The part that the driver keeps from CUDA. A card that is given by its size has none.
        reserve_source: Where the reserve was read.
        capability: Its compute capability; 0 if it is not known.
        workspace_bytes: The size of cuBLAS's workspace, if torch told it.
        note: What else a person has to know about its memory.
    """

    name: str
    memory_bytes: int
    context_bytes: int | None = None
    reserve_bytes: int = 0
    reserve_source: str = ""
    capability: float = 0.0
    workspace_bytes: int | None = None
    note: str = ""

    @property
    def before_ampere(self) -> bool:
        """Whether it is known to have no bf16 products and no flash attention 2."""
        return 0 < self.capability < AMPERE

    @property
    def cublas_bytes(self) -> int:
        """The size of cuBLAS's workspace, which counts as allocated."""
        return self.workspace_bytes or (CUBLAS_HOPPER_BYTES if self.capability >= HOPPER else CUBLAS_BYTES)

    @property
    def usable_bytes(self) -> int:
        """The bytes that CUDA can hand out, its own contexts included."""
        return self.memory_bytes - self.reserve_bytes

    def fits(self, least_bytes: int, device_bytes: int) -> Fits:
        """Returns whether a run fits.

        Before torch gives up, it frees the segments that are wholly free and tries again (``c10/cuda/
        CUDACachingAllocator.cpp``). So a run ends out of memory if the others do not fit, and it gives nothing back if
        what its allocator would reserve fits too.

        Args:
            least_bytes: The bytes of its tensors, or of the segments that they keep on this card, and the CUDA context.
            device_bytes: The bytes that it takes where there is room: reserved ones, and the CUDA context.
        """
        if least_bytes > self.usable_bytes:
            return "no"
        return "yes" if device_bytes <= self.usable_bytes else "tight"

    def room(self, least_bytes: int, device_bytes: int) -> dict[str, Any]:
        """Returns whether a run fits, and the bytes that are left or missing, by the names that they have in answers.

        A negative number of bytes that are left says how many the allocator would have to give back.
        """
        return {
            "fits": self.fits(least_bytes, device_bytes),
            "headroom_bytes": self.usable_bytes - device_bytes,
            "missing_bytes": max(0, least_bytes - self.usable_bytes),
        }


@dataclass(frozen=True)
class Speed:
    """The peak rates of a card, per second.

    Attributes:
        bf16_flops: Floating-point operations of dense products of 16-bit numbers that are summed in fp32.
        fp32_flops: Those of products of fp32 numbers; torch does not round them to TF32.
        memory_bytes: Bytes from and to its own memory.
        link_bytes: Bytes to another card, in one direction.
    """

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    link_bytes: float = 32e9


class Rates(NamedTuple):
    """The rates that a machine reaches.

    Attributes:
        flops: The floating-point operations per second of a large product.
        copied_bytes: The bytes per second of a large copy, read and written.
        casts: Whether products of 16-bit matrices are computed in fp32.
    """

    flops: float
    copied_bytes: float
    casts: bool


RESERVE_SHARE = 0.03
"""The share assumed for a driver's reserve that nobody reported: about the largest of those that were."""

CARDS_FILE = Path(__file__).with_name("cards.csv")
"""The known cards, one a row; an empty cell is not known.

``memory_mib`` is the total of nvidia-smi, or of cudaMemGetInfo and rocminfo where it shows none. ``usable_gib`` is the
total that torch's OutOfMemoryError named on the card, and ``usable_source`` the public thread that quotes it; where
threads differ with the driver, it is the smallest. The AgileRL project measured ``context_mib`` with torch 2.11. The
speeds are those of NVIDIA's data sheets and white papers, without sparsity; links are NVLink or PCIe. Cards before
Ampere have none, because they have no units for bf16.
"""


def _gpu(row: dict[str, str]) -> Gpu:
    memory = int(row["memory_mib"]) * MIB
    usable = int(float(row["usable_gib"]) * GIB) if row["usable_gib"] else int(memory * (1 - RESERVE_SHARE))
    return Gpu(
        name=row["name"],
        memory_bytes=memory,
        context_bytes=int(row["context_mib"]) * MIB if row["context_mib"] else None,
        reserve_bytes=max(0, memory - usable),
        reserve_source=row["usable_source"] or f"assumed: {RESERVE_SHARE:.0%}",
        capability=float(row["compute_capability"] or 0),
        note=row["note"],
    )


def _speed(row: dict[str, str]) -> Speed:
    units = {"bf16_teraflops": 1e12, "fp32_teraflops": 1e12, "memory_gb_per_second": 1e9, "link_gb_per_second": 1e9}
    return Speed(*(float(row[column]) * unit for column, unit in units.items()))


with CARDS_FILE.open(newline="", encoding="utf-8") as _file:
    _ROWS = {row["key"]: row for row in csv.DictReader(_file)}
GPUS: dict[str, Gpu] = {key: _gpu(row) for key, row in _ROWS.items()}
"""The known cards by the names that commands take."""
SPEEDS: dict[str, Speed] = {key: _speed(row) for key, row in _ROWS.items() if row["bf16_teraflops"]}
"""The peak rates of each card, as far as they are known."""

USUAL_CARDS = ("rtx4080", "rtx4090", "a100", "a6000", "a100-80gb", "h200")
"""If only the memory of a card is known, estimates use the speed of the one of these cards with the nearest memory."""

SMALLEST_MODEL_NUMBER = 1000
"""A number without a unit means GiB if it is smaller than this, and the name of a card otherwise."""

_UNITS = {"mib": MIB, "mb": 10**6, "gib": GIB, "gb": 10**9, "": GIB}


def find_gpu(text: str) -> Gpu:
    """Returns the card with a name or a memory size.

    >>> find_gpu("24GiB").memory_bytes == find_gpu("24").memory_bytes == 24 * 2**30
    True
    >>> find_gpu("NVIDIA RTX 4090").name
    'RTX 4090'

    Raises:
        InputError: The text is neither a known name nor a size.
    """
    size = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text.lower())
    if size and size[2] in _UNITS and float(size[1]) > 0 and (size[2] or float(size[1]) < SMALLEST_MODEL_NUMBER):
        return Gpu(f"a card with {text}", int(float(size[1]) * _UNITS[size[2]]))
    key = _plain(text)
    for name, gpu in GPUS.items():
        if key in (_plain(name), _plain(gpu.name)) or f"rtx{key}" == name:
            return gpu
    hint = (
        f"{close_match(text.lower(), GPUS)}; or give its memory, as in 24GiB, and for its time --tflops and --bandwidth"
    )
    raise InputError(Problem("gpu", f"unknown card (got {shown(text)})", hint))


def known_speed(gpu: Gpu) -> Speed | None:
    """Returns what a card can do, by its name, or None."""
    return next((SPEEDS[name] for name, card in GPUS.items() if card.name == gpu.name and name in SPEEDS), None)


def speed_of(gpu: Gpu) -> tuple[Speed, str]:
    """Returns what a card can do, or else what the one with the nearest memory can, and the name of that card.

    >>> speed_of(find_gpu("rtx4090"))[1], speed_of(find_gpu("80GB"))[1]
    ('RTX 4090', 'A100 80 GB')
    """
    nearest = min(USUAL_CARDS, key=lambda name: abs(GPUS[name].memory_bytes - gpu.memory_bytes))
    known = known_speed(gpu)
    return (known, gpu.name) if known else (SPEEDS[nearest], GPUS[nearest].name)


SAME_MEMORY = 0.06
"""The share by which two totals of one card differ: torch's is that of nvidia-smi less the driver's reserve."""


def known_card(device_name: str, memory_bytes: int = 0) -> Gpu | None:
    """Returns the card with the driver's name and the measured memory, or None.

    Without a measurement the name decides, by the memory in it. A name that says more is another card's: a Ti, a
    Laptop, a slice (MIG).

    >>> [known_card(f"NVIDIA {name}").name for name in ("GeForce RTX 4090", "A100-SXM4-40GB", "A100-SXM4-80GB")]
    ['RTX 4090', 'A100 40 GB', 'A100 80 GB']
    >>> known_card("Something"), known_card("NVIDIA RTX A1000"), known_card("NVIDIA H100 NVL")
    (None, None, None)
    """
    name = _plain(device_name)
    for key, gpu in GPUS.items():
        said = re.fullmatch(rf"(?:rtx)?{key.partition('-')[0]}(?:(\d+)gb)?", name)
        measured = memory_bytes or (int(said[1]) * GIB if said and said[1] else gpu.memory_bytes)
        if said and abs(measured / gpu.memory_bytes - 1) <= SAME_MEMORY:
            return gpu
    return None


def measured_card(device_name: str, memory_bytes: int, capability: float) -> Gpu:
    """Returns the known card, or one of which only the measured memory and the compute capability are known."""
    return known_card(device_name, memory_bytes) or Gpu(device_name, memory_bytes, capability=capability)


def has_kernels(capability: float, architectures: Sequence[str]) -> bool:
    """Returns whether a build of torch for these architectures runs on a card of a compute capability.

    Kernels run on later cards of their own generation too, and what is not compiled yet (``compute_90``) on all later
    ones. A build that names none is of another maker, or for processors.

    >>> built = ["sm_75", "sm_80", "sm_90a"]
    >>> [capability for capability in (6.0, 7.0, 7.5, 8.9, 9.0, 12.0) if has_kernels(capability, built)]
    [7.5, 8.9, 9.0]
    >>> has_kernels(12.0, [*built, "compute_90"]), has_kernels(7.0, [])
    (True, True)
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)[af]?", name) for name in architectures]
    built = [(kind[1], int(kind[2]) / 10) for kind in found if kind]
    return not built or any(
        version <= capability and (kind == "compute" or int(version) == int(capability)) for kind, version in built
    )


def without_bf16(device_name: str, capability: Any = None) -> bool:
    """Returns whether a card is known to compute no bf16 products itself; its name counts without a capability.

    >>> without_bf16("Tesla T4"), without_bf16("NVIDIA L4"), without_bf16("NVIDIA TITAN RTX", "7.5")
    (True, False, True)
    """
    known = known_card(device_name)
    return 0 < float(capability or (known.capability if known else 0)) < AMPERE


def _plain(name: str) -> str:
    """Returns a name without makers, forms and spaces.

    >>> _plain("NVIDIA H100 80GB HBM3"), _plain("Tesla V100-PCIE-32GB"), _plain("NVIDIA GeForce RTX 4090 Laptop GPU")
    ('h10080gb', 'v10032gb', 'rtx4090laptopgpu')
    """
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|sxm\d*|pcie|dgxs|hbm\d*e?|[\s_-]", "", name.lower())
