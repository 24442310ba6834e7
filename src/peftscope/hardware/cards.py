"""Graphics cards: their memory, and the part that CUDA takes before the first tensor. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.words import GIB, MIB

CONTEXT_BYTES = 501 * MIB
"""The size assumed for a CUDA context that was not measured: the largest that was (an A100, torch 2.11)."""
CUBLAS_BYTES = 8_519_680
"""cuBLAS keeps a workspace of this size per stream (``:4096:2:16:8``). Source: torch's ``CublasHandlePool``."""
CUBLAS_HOPPER_BYTES = 32 * MIB

Fits = Literal["yes", "tight", "no"]
"""Whether a run fits. Tight: torch's allocator has to give back memory that it caches, and steps are slower."""


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: The name that people use.
        memory_bytes: The total that ``nvidia-smi`` shows.
        context_bytes: The size of a CUDA context, if it was measured.
        cublas_bytes: The size of cuBLAS's workspace, which counts as allocated.
        reserve_bytes: The part that the driver keeps from CUDA. A card that is given by its size has none.
        reserve_source: Where the reserve was read.
        before_ampere: Whether its compute capability is below 8.0: it has no bf16 products and no flash attention 2.
        note: What else a person has to know about its memory.
    """

    name: str
    memory_bytes: int
    context_bytes: int | None = None
    cublas_bytes: int = CUBLAS_BYTES
    reserve_bytes: int = 0
    reserve_source: str = ""
    before_ampere: bool = False
    note: str = ""

    @property
    def usable_bytes(self) -> int:
        """The bytes that CUDA can hand out, its own contexts included."""
        return self.memory_bytes - self.reserve_bytes

    def fits(self, least_bytes: int, device_bytes: int) -> Fits:
        """Returns whether a run fits.

        Before torch gives up, it frees the segments that are wholly free and tries again (``c10/cuda/
        CUDACachingAllocator.cpp``). So a run ends out of memory if its tensors alone do not fit, and it gives nothing
        back if what its allocator would reserve fits too.

        Args:
            least_bytes: The bytes of its tensors, and the CUDA context.
            device_bytes: The bytes that it takes where there is room: reserved ones, and the CUDA context.
        """
        if least_bytes > self.usable_bytes:
            return "no"
        return "yes" if device_bytes <= self.usable_bytes else "tight"


RESERVE_SHARE = 0.03
"""The share assumed for a driver's reserve that nobody reported: about the largest of those that were."""

REPORTED_GIB: dict[str, tuple[float, str]] = {
    "RTX 3090": (23.69, "ucwxb/GraphAvatar issue 4"),
    "RTX 4060": (7.75, "ESRSchao/EdgeRegNet issue 2"),
    "RTX 4090": (23.52, "Soul-AILab/SoulX-FlashTalk issue 5"),
    "RTX PRO 6000": (94.97, "antirez/ds4 issue 431"),
    "GB10": (121.69, "MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks issue 47"),
    "B200": (178.35, "pytorch/ao pull 4002"),
    "MI300X": (191.98, "rocminfo's pool of 201,310,208 KB"),
    "RTX 5090": (31.36, "TrajectoryCrafter/TrajectoryCrafter issue 20"),
    "T4": (14.56, "AlphaGPU/leetgpu-challenges issue 52"),
    "V100 32 GB": (31.74, "liucongg/ChatGLM-Finetuning issue 73"),
    "A10": (21.99, "zai-org/CogVLM issue 236"),
    "L40S": (44.42, "stepfun-ai/Step-Video-T2V issue 8"),
    "A100 40 GB": (39.38, "QwenLM/Qwen3-VL issue 881"),
    "A100 80 GB": (79.25, "wbfwonderful/Vad-R1 issue 11"),
    "H100 80 GB": (79.11, "vllm-project/vllm issue 27508"),
}
"""The total that torch's OutOfMemoryError named on a card, and the public thread that quotes it. Where threads differ
with the driver, it is the smallest."""


def _gpu(
    name: str, mib: int, context_mib: int | None = None, *, hopper: bool = False, old: bool = False, note: str = ""
) -> Gpu:
    context = context_mib * MIB if context_mib else None
    cublas = CUBLAS_HOPPER_BYTES if hopper else CUBLAS_BYTES
    usable, source = REPORTED_GIB.get(name, (mib / 1024 * (1 - RESERVE_SHARE), f"assumed: {RESERVE_SHARE:.0%}"))
    return Gpu(name, mib * MIB, context, cublas, max(0, mib * MIB - int(usable * GIB)), source, old, note)


GPUS: dict[str, Gpu] = {
    "gtx1080ti": _gpu("GTX 1080 Ti", 11264, old=True),
    "rtx2080ti": _gpu("RTX 2080 Ti", 11264, old=True),
    "rtx3060": _gpu("RTX 3060", 12288),
    "rtx3080": _gpu("RTX 3080", 10240),
    "rtx3090": _gpu("RTX 3090", 24576),
    "rtx4060": _gpu("RTX 4060", 8188),
    "rtx4070": _gpu("RTX 4070", 12282),
    "rtx4080": _gpu("RTX 4080", 16376),
    "rtx4090": _gpu("RTX 4090", 24564),
    "rtx5090": _gpu("RTX 5090", 32607),
    "rtxpro6000": _gpu("RTX PRO 6000", 97887),
    "a6000": _gpu("RTX A6000", 49140),
    "t4": _gpu("T4", 15360, old=True),
    "v100": _gpu("V100 16 GB", 16384, old=True),
    "v100-32gb": _gpu("V100 32 GB", 32768, old=True),
    "a10": _gpu("A10", 23028),
    "a10g": _gpu("A10G", 23028),
    "l4": _gpu("L4", 23034, 226),
    "l40s": _gpu("L40S", 46068),
    "a100": _gpu("A100 40 GB", 40960, 501),
    "a100-80gb": _gpu("A100 80 GB", 81920, 501),
    "h100": _gpu("H100 80 GB", 81559, hopper=True),
    "h200": _gpu("H200", 143771, hopper=True),
    "b200": _gpu("B200", 183359, hopper=True),
    "gb10": _gpu("GB10", 124611, note="shares its memory with the host, which needs a part of it"),
    "mi300x": _gpu("MI300X", 196592, note="its memory alone is known: ROCm's kernels and context may take other sizes"),
}
"""The known cards. Totals are those of nvidia-smi, or of cudaMemGetInfo and rocminfo where it shows none;
the AgileRL project measured the contexts with torch 2.11."""


@dataclass(frozen=True)
class Speed:
    """What a card can do at most, per second.

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


def _speed(bf16_tera: float, fp32_tera: float, memory_giga: float, link_giga: float = 32) -> Speed:
    return Speed(bf16_tera * 1e12, fp32_tera * 1e12, memory_giga * 1e9, link_giga * 1e9)


SPEEDS: dict[str, Speed] = {
    "rtx3060": _speed(25.4, 12.7, 360),
    "rtx3080": _speed(59.5, 29.8, 760),
    "rtx3090": _speed(71, 35.6, 936),
    "rtx4060": _speed(30.2, 15.1, 272),
    "rtx4070": _speed(58.3, 29.1, 504),
    "rtx4080": _speed(97.5, 48.7, 717),
    "rtx4090": _speed(165.2, 82.6, 1008),
    "rtx5090": _speed(209.5, 104.8, 1792, 64),
    "a6000": _speed(154.8, 38.7, 768),
    "a10": _speed(125, 31.2, 600),
    "l4": _speed(121, 30.3, 300),
    "l40s": _speed(362, 91.6, 864),
    "a100": _speed(312, 19.5, 1555, 300),
    "a100-80gb": _speed(312, 19.5, 2039, 300),
    "h100": _speed(989, 67, 3350, 450),
    "h200": _speed(989, 67, 4800, 450),
}
"""What each card can do. Source: NVIDIA's data sheets and white papers; without sparsity, and links are NVLink or PCIe.
Cards before Ampere are missing: they have no units for bf16."""

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


def known_card(device_name: str) -> Gpu | None:
    """Returns the card whose name is part of the driver's name, or None.

    A name that goes on with a zero is another card's: an RTX A1000 is no A100.

    >>> [known_card(f"NVIDIA {name}").name for name in ("GeForce RTX 4090", "A100-SXM4-40GB", "A100-SXM4-80GB")]
    ['RTX 4090', 'A100 40 GB', 'A100 80 GB']
    >>> known_card("Something"), known_card("NVIDIA RTX A1000"), known_card("NVIDIA RTX A4000 Laptop GPU")
    (None, None, None)
    """
    name = _plain(device_name)
    contained = [key for key in GPUS if re.search(f"{_plain(key)}(?!0)", name)]
    return GPUS[max(contained, key=len)] if contained else None


def without_bf16(device_name: str) -> bool:
    """Returns whether a card, by the name that torch gives it, is known to compute no bf16 products itself.

    >>> without_bf16("Tesla T4"), without_bf16("NVIDIA L4")
    (True, False)
    """
    card = known_card(device_name)
    return card is not None and card.before_ampere


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|sxm\d*|[\s_-]", "", name.lower())
