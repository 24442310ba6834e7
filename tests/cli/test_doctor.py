"""What doctor says of machines that are made up: in one line each what will not work, before any download."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftscope.cli import doctor, main
from peftscope.cli.doctor import Finding, card_findings, examine, limits
from peftscope.errors import InputError
from peftscope.execution.job import card_problems, check_cards
from peftscope.hardware import device
from peftscope.hardware.cards import GIB
from peftscope.hardware.device import driver_version, system_name

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes up a machine: a card, a driver, a build of torch and a system."""

    def make(
        name: str = "NVIDIA L4",
        gib: float = 22,
        capability: tuple[int, int] = (8, 9),
        *,
        driver: str = "580.65.06",
        cuda: str = "13.0",
        built: list[str] = CUDA_13,
        nvml: bool = True,
        release: str = "6.8.0-generic",
        count: int = 1,
    ) -> None:
        for variable in ("PEFTSCOPE_DEVICE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(variable, raising=False)
        library = SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: count,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda card: name,
            nvmlDeviceGetCudaComputeCapability=lambda card: capability,
            nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=int(gib * GIB)),
            nvmlSystemGetDriverVersion=lambda: driver.encode(),
        )
        monkeypatch.setitem(sys.modules, "pynvml", library if nvml else None)
        monkeypatch.setattr(device, "DRIVER", tmp_path / "gpus")
        (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "gpus/0000:01:00.0/information").write_text(f"Model: \t\t {name}\n")
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue May 27\n")
        usable = int(driver.split(".")[0]) >= (580 if cuda.startswith("13") else 525)
        major, minor = capability
        properties = SimpleNamespace(name=name, total_memory=int(gib * GIB), major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr("platform.release", lambda: release)

    return make


MACHINES: dict[str, tuple[dict[str, Any], str, str]] = {
    "T4 with driver 535": (
        {"name": "Tesla T4", "gib": 14.56, "capability": (7, 5), "driver": "535.183.01"},
        "CUDA",
        "needs a driver from 580 on: rm -r .venv && make setup TORCH_INDEX=",
    ),
    "V100": (
        {"name": "Tesla V100-SXM2-16GB", "gib": 15.8, "capability": (7, 0)},
        "card",
        "Tesla V100-SXM2-16GB, 15.8 GiB, compute capability 7.0: this torch has no kernels for it",
    ),
    "P100": (
        {"name": "Tesla P100-PCIE-16GB", "gib": 15.9, "capability": (6, 0), "cuda": "12.6", "built": CUDA_12},
        "card",
        "compute capability 6.0; no bf16 products: its times decide no claim",
    ),
    "RTX 4060 Ti 16 GB": (
        {"name": "NVIDIA GeForce RTX 4060 Ti", "gib": 15.7},
        "card",
        "15.7 GiB, compute capability 8.9; its speed is not known: forecasts take that of RTX 4080",
    ),
    "4090 Laptop": (
        {"name": "NVIDIA GeForce RTX 4090 Laptop GPU", "gib": 15.7},
        "card",
        "Laptop GPU, 15.7 GiB, compute capability 8.9; its speed is not known",
    ),
    "H100 MIG 1g": (
        {"name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "gib": 9.5, "capability": (9, 0)},
        "card",
        "9.5 GiB, compute capability 9.0; a slice, whose clocks and power are not told; its speed is not known",
    ),
    "WSL2": ({"release": "5.15.153.1-microsoft-standard-WSL2"}, "WSL2", "its runs decide no claim"),
    "a container without NVML": ({"nvml": False}, "NVML", "records lack the peak of the whole card and its clocks"),
}


def lines(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: f"{finding.found}: {finding.remedy}" for finding in findings}


@pytest.mark.parametrize("name", MACHINES)
def test_doctor_says_in_one_line_what_will_not_work(name: str, machine: Any) -> None:
    facts, what, said = MACHINES[name]
    machine(**facts)
    found = lines([*card_findings(), *limits()])
    assert said in found[what] and "\n" not in found[what]
    assert f"driver {facts.get('driver', '580.65.06')}, torch {torch.__version__} of CUDA" in found["CUDA"]
    assert "for sm_" in found["CUDA"]


def test_a_machine_on_which_all_works_has_nothing_to_be_said(machine: Any) -> None:
    machine()
    found = [*card_findings(), *limits()]
    assert [(finding.what, finding.fine) for finding in found] == [("CUDA", True), ("card", True)]
    assert found[1].found == "NVIDIA L4, 22.0 GiB, compute capability 8.9" and not found[1].remedy


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((6, 0), True), ((7, 5), False), ((8, 9), False)])
def test_a_card_without_kernels_is_refused_before_a_run(
    capability: tuple[int, int], refused: bool, machine: Any
) -> None:
    machine("Tesla V100-SXM2-16GB", 16, capability, count=2)
    assert len(card_problems(2)) == 2 * refused
    if refused:
        with pytest.raises(InputError, match=r"no kernels for Tesla V100.*built for sm_75.*TORCH_INDEX"):
            check_cards(1)
    machine(driver="535.183.01")
    with pytest.raises(InputError, match="doctor"):
        check_cards(1)


def test_a_sweep_is_refused_before_anything_is_fetched(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("Tesla V100-SXM2-16GB", 16, (7, 0))
    monkeypatch.setattr("peftscope.execution.sweep.fetch_inputs", lambda spec: pytest.fail("it is fetched"))
    with pytest.raises(InputError, match="no kernels for Tesla V100"):
        main.sweep("gpu-check")


def test_doctor_ends_without_a_traceback_whatever_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device\nand so on")

    monkeypatch.setattr(torch, "linspace", breaks)
    monkeypatch.setattr(doctor, "cards", breaks)
    found = {finding.what: finding for finding in examine()}
    assert found["bitsandbytes"].found.endswith(
        "fails on cpu: no kernel image is available for execution on the device"
    )
    assert found["CUDA"].found == "RuntimeError: no kernel image is available for execution on the device"
    assert not found["bitsandbytes"].fine and not found["CUDA"].fine and found["processor"].fine


def test_doctor_says_what_shards_compiling_and_kaggle_lack(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(count=2)
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=64 * 2**20))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    found = lines(limits())
    assert "--shm-size" in found["shards"] and "python3-dev" in found["compile"] and "20 GB" in found["disk"]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor, "find_compiler", lambda device: "gcc")
    machine()
    assert set(lines(limits())) == {"disk"}  # one card needs no shared memory


def test_a_record_names_the_capability_the_driver_and_wsl(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftscope.execution.provenance import hardware

    machine("TITAN RTX", 24, (7, 5), release="5.15.153.1-microsoft-standard-WSL2")
    facts = hardware("cuda")
    assert (facts["compute_capability"], facts["driver"]) == ("7.5", "580.65.06")
    assert facts["system"] == system_name() == "Linux (WSL2)"
    machine(nvml=False, driver="575.57.08")
    assert driver_version() == "575.57.08" and hardware("cuda")["system"] == "Linux"
