"""Which card it is: measured memory and compute capability decide, and a broken NVML is not "no card"."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftscope.execution import pace
from peftscope.hardware import device
from peftscope.hardware.cards import (
    CUBLAS_BYTES,
    CUBLAS_HOPPER_BYTES,
    GIB,
    GPUS,
    Gpu,
    known_card,
    measured_card,
    without_bf16,
)
from peftscope.hardware.device import Card, cards, cards_claimed, detect_device, visible_cards
from peftscope.hardware.nvml import driver_reserve_bytes, find_card, memory, used_bytes

MIB = 2**20
SLICE = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 16),
        ("NVIDIA GeForce RTX 4060 Ti", 8),
        ("NVIDIA GeForce RTX 3060 Ti", 8),
        ("NVIDIA GeForce RTX 3080 Ti", 12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16),
        ("NVIDIA GeForce RTX 3060", 8),
        ("NVIDIA H100 NVL", 94),
        ("NVIDIA GH200 480GB", 95),
        (SLICE, 10),
        ("NVIDIA A100-SXM-64GB", 64),
    ],
)
def test_a_card_of_a_longer_name_or_other_memory_is_not_the_known_one(name: str, gib: int) -> None:
    assert known_card(name, gib * GIB) is None
    card = measured_card(name, gib * GIB, 8.9)
    assert (card.name, card.memory_bytes, card.before_ampere) == (name, gib * GIB, False)


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("Tesla T4", 14.56, "t4"),  # torch's total is without the driver's reserve
        ("Tesla V100-SXM2-16GB", 15.77, "v100"),
        ("Tesla V100-PCIE-32GB", 31.74, "v100-32gb"),
        ("NVIDIA A100-SXM4-40GB", 39.38, "a100"),
        ("NVIDIA A100 80GB PCIe", 79.25, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79.11, "h100"),
        ("NVIDIA RTX A6000", 47.4, "a6000"),
        ("NVIDIA GeForce RTX 4090", 23.52, "rtx4090"),
        ("NVIDIA L40S", 44.42, "l40s"),
        ("NVIDIA B200", 178.35, "b200"),
    ],
)
def test_a_known_card_is_known_by_its_name_and_its_memory(name: str, gib: float, key: str) -> None:
    assert known_card(name, int(gib * GIB)) == known_card(name) == GPUS[key]


@pytest.mark.parametrize("name", ["GeForce RTX 2060", "TITAN RTX", "Quadro RTX 8000", "Tesla P100-PCIE-16GB"])
def test_a_card_has_no_bf16_by_its_capability_whatever_it_is_called(name: str) -> None:
    assert without_bf16(name, "6.0") and without_bf16(name, 7.5) and not without_bf16(name, 8.0)
    assert Gpu(name, GIB, capability=7.5).before_ampere and not Gpu(name, GIB).before_ampere


def test_cublas_takes_its_larger_workspace_from_hopper_on_or_what_torch_tells() -> None:
    sizes = [Gpu("", GIB, capability=capability).cublas_bytes for capability in (0, 8.9, 9.0, 10.0, 12.0)]
    assert sizes == 2 * [CUBLAS_BYTES] + 3 * [CUBLAS_HOPPER_BYTES]
    assert GPUS["rtx5090"].cublas_bytes == GPUS["gb10"].cublas_bytes == CUBLAS_HOPPER_BYTES
    assert Gpu("", GIB, capability=12.0, workspace_bytes=MIB).cublas_bytes == MIB


class Nvml:
    """Stands where the driver's library does; every other card is in slices, of which number 1 is not made."""

    nvmlMemory_v2 = 2

    def __init__(self, *names: str, slices: int = 0, version: int = 2, broken: bool = False) -> None:
        self.names, self.slices, self.version, self.broken = names, slices, version, broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise RuntimeError("Driver/library version mismatch")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.names[index]

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> str:
        return self.names[0]

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        return uuid.decode()

    def nvmlDeviceGetMigMode(self, card: str) -> list[int]:
        return [int(self.slices > 0), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: str, index: int) -> str:
        if index == 1 or index > self.slices:
            raise RuntimeError("Not Found")
        return f"MIG-{index}"

    def nvmlDeviceGetUUID(self, card: str) -> str:
        return card

    def nvmlDeviceGetName(self, card: str) -> bytes:
        return (SLICE if card.startswith("MIG-") else card).encode()

    def nvmlDeviceGetCudaComputeCapability(self, card: str) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetMemoryInfo(self, card: str, version: int = 1) -> SimpleNamespace:
        if version > self.version:
            raise RuntimeError("Function Not Found")
        total, used = (10 * GIB, GIB) if card.startswith("MIG-") else (80 * GIB, 60 * GIB)
        reserve = {"reserved": 600 * MIB} if version == 2 else {}
        return SimpleNamespace(total=total, used=used + 600 * MIB * (version == 1), **reserve)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an NVML in place, on a machine without a driver's files and without a wish for a device."""
    monkeypatch.setattr(device, "DRIVER", tmp_path / "gpus")
    for name in ("PEFTSCOPE_DEVICE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return lambda nvml: monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_memory_in_use_is_told_without_the_drivers_reserve(machine: Any) -> None:
    machine(Nvml("card"))
    assert (used_bytes("card"), driver_reserve_bytes("card")) == (60 * GIB, 600 * MIB)
    machine(Nvml("card", version=1))
    assert (used_bytes("card"), driver_reserve_bytes("card")) == (60 * GIB + 600 * MIB, None)


def test_slices_are_cards_of_their_own(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml("NVIDIA H100 80GB HBM3", slices=2)
    machine(nvml)
    assert cards() == [Card(key, SLICE, 10 * GIB, 9.0) for key in ("MIG-0", "MIG-2")]
    assert visible_cards() == ["MIG-0", "MIG-2"]
    assert pace.this_card() == Gpu(SLICE, 10 * GIB, capability=9.0)
    # The handle of the whole card would tell what its other tenants use.
    assert find_card("00000000:3B:00.0") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    assert find_card("00000000:3B:00.0") == "MIG-2" and used_bytes("MIG-2") == GIB
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine(Nvml("NVIDIA H100 80GB HBM3"))
    assert find_card("00000000:3B:00.0") == "NVIDIA H100 80GB HBM3" and memory(nvml, "card").total == 80 * GIB


def test_a_broken_nvml_is_not_no_card(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(Nvml(broken=True))
    assert cards() == [] and detect_device() == "cpu"
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus/0000:01:00.0/information").write_text("Model: \t\t Tesla T4\n")
    assert cards() == [Card("0", "Tesla T4")] and detect_device() == "cuda"
    assert pace.this_card() == GPUS["t4"]


def test_without_nvml_and_the_drivers_files_torch_is_asked_apart(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(Nvml(broken=True))
    (tmp_path / "dxg").touch()
    (tmp_path / "torch.py").write_text(
        "class cuda:\n"
        "    device_count = staticmethod(lambda: 1)\n"
        "    class get_device_properties:\n"
        "        name, total_memory, major, minor = 'RTX 4060 Ti', 2**34, 8, 9\n"
        "        def __init__(self, index): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(device, "DEVICES", (tmp_path / "dxg",))
    device._cards_by_torch.cache_clear()
    assert cards() == [Card("0", "RTX 4060 Ti", 2**34, 8.9)] and detect_device() == "cuda"
    device._cards_by_torch.cache_clear()


def test_cards_are_numbered_as_nvml_does_once_they_are_claimed(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    machine(Nvml("RTX 4090", "A100"))
    with cards_claimed(1, tmp_path) as mine:
        assert mine == ["0"]
        assert (os.environ.pop("CUDA_VISIBLE_DEVICES"), os.environ.pop("CUDA_DEVICE_ORDER")) == ("0", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")  # whoever numbered them knows the order
    with cards_claimed(1, tmp_path):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1" and "CUDA_DEVICE_ORDER" not in os.environ
