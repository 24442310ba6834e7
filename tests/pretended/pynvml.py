"""NVML of the pretended card: what peftscope asks of it, in the library's own words."""

import os
import sys
from types import SimpleNamespace
from typing import Any

from described import described

CARD = described()
if CARD.nvml == "missing":
    raise ModuleNotFoundError("No module named 'pynvml'", name="pynvml")

MIB = 2**20
CONTEXT, RESERVED, NEIGHBOUR = 490 * MIB, 766 * MIB, 2048 * MIB
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
nvmlMemory_v2 = 0x2000028


class NVMLError(Exception): ...


def nvmlInit() -> None:
    if CARD.nvml == "broken":
        raise NVMLError("Driver/library version mismatch")


def nvmlSystemGetDriverVersion() -> str:
    return "pretended"


def nvmlDeviceGetCount() -> int:
    return CARD.count


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    return f"card {index}"


def nvmlDeviceGetHandleByPciBusId(address: bytes) -> str:
    bus = int(address.decode().split(":")[1], 16)
    if not 59 <= bus < 59 + CARD.count:
        raise NVMLError("Not Found")
    return f"card {bus - 59}"


def nvmlDeviceGetHandleByUUID(uuid: bytes) -> str:
    return "slice 0" if uuid == b"MIG-0" else "slice 1"


def nvmlDeviceGetMigMode(_: str) -> tuple[int, int]:
    if CARD.nvml != "slice":
        raise NVMLError("Not Supported")
    return 1, 1


def nvmlDeviceGetMaxMigDeviceCount(_: str) -> int:
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(_: str, index: int) -> str:
    if index > 1:
        raise NVMLError("Not Found")
    return f"slice {index}"


def nvmlDeviceGetUUID(handle: str) -> str:
    return f"{'MIG' if handle.startswith('slice') else 'GPU'}-{handle[-1]}"


def nvmlDeviceGetName(_: str) -> str:
    return CARD.name


def nvmlDeviceGetCudaComputeCapability(_: str) -> tuple[int, int]:
    return CARD.major, CARD.minor


def nvmlDeviceGetMemoryInfo(handle: str, version: int = 0) -> Any:
    if version and CARD.nvml == "v1":
        raise NVMLError("Function Not Found")
    card = sys.modules.get("card")
    used = CONTEXT + card.MEMORY.held if card and card.MEMORY.began else 0
    total = int(CARD.total_mib * MIB) + RESERVED
    if handle in ("slice 1", "card 0") and CARD.nvml == "slice":
        used += NEIGHBOUR
    if not version:
        return SimpleNamespace(total=total, used=used + RESERVED, free=total - used - RESERVED)
    return SimpleNamespace(total=total, used=used, reserved=RESERVED, free=total - used - RESERVED)


def nvmlDeviceGetClockInfo(_: str, kind: int) -> int:
    return {NVML_CLOCK_SM: 1410, NVML_CLOCK_MEM: 1593}[kind]


def nvmlDeviceGetPowerUsage(_: str) -> int:
    return 300_000


def nvmlDeviceGetEnforcedPowerLimit(_: str) -> int:
    return 400_000


def nvmlDeviceGetTemperature(_: str, kind: int) -> int:
    return {NVML_TEMPERATURE_GPU: 55}[kind]


def nvmlDeviceGetComputeRunningProcesses(_: str) -> list[Any]:
    return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=CONTEXT)]
