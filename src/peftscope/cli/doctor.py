"""The abilities of this machine, with a remedy for each that is missing."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from peftscope.execution.pace import run_seconds
from peftscope.hardware.bf16 import VARIABLE, Way, chosen_way, has_native_bf16
from peftscope.hardware.cards import OLDER_BUILD, has_kernels, known_speed, measured_card, speed_of
from peftscope.hardware.device import WSL, Card, cards, detect_device, driver_version, find_compiler, system_name
from peftscope.spec import RunSpec
from peftscope.words import spoken_bytes, spoken_time

LEAST_DRIVER = {"12": 525, "13": 580}
"""The oldest driver for each generation of CUDA, by NVIDIA's table of compatibility."""
SHARED_MEMORY = Path("/dev/shm")

HOW: dict[Way, str] = {"native": "natively", "fp32": "in fp32"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fine: bool
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Returns the findings on processor, memory, cards, torch and bitsandbytes."""
    looks = {
        "processor": _processor,
        "CUDA": card_findings,
        "torch": lambda: [Finding("torch", True, version("torch"))],
        "bf16": _bf16,
        "pace": _pace,
        "bitsandbytes": _bitsandbytes,
        "limits": limits,
    }
    return [finding for what, look in looks.items() for finding in _looked(what, look)]


def _looked(what: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Returns findings, or one that says what went wrong: what is broken must not hide the rest."""
    try:
        return look()
    except Exception as error:  # whatever a library or a driver raises, a person needs one line
        return [Finding(what, False, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")]


def _processor() -> list[Finding]:
    memory = psutil.virtual_memory().total
    return [Finding("processor", True, f"{psutil.cpu_count()} cores, {spoken_bytes(memory, 0)} of memory")]


def card_findings() -> list[Finding]:
    """Returns what torch, the driver and each card can do together."""
    import torch

    found, usable, driver = cards(), torch.cuda.is_available(), driver_version()
    built, cuda = torch.cuda.get_arch_list(), torch.version.cuda
    if not (found or usable):
        return [Finding("CUDA", True, "no NVIDIA card; runs use the processor")]
    if usable:  # torch sees the slices and the cards that this process may use
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        found = [Card("", card.name, card.total_memory, card.major + card.minor / 10) for card in properties]
    says = f"driver {driver or 'of unknown version'}, torch {torch.__version__}"
    says += f" of CUDA {cuda}" + f" for {', '.join(built)}" * bool(built) if cuda else ", a build for processors"
    remedy, least = "", LEAST_DRIVER.get((cuda or "").partition(".")[0], 0)
    if not cuda:
        remedy = "torch cannot use the card: rm -r .venv && make setup"
    elif not usable and driver and int(driver.partition(".")[0]) < least:
        remedy = f"CUDA {cuda} needs a driver from {least} on: {OLDER_BUILD}"
    elif not usable:
        remedy = "torch cannot use the card: see nvidia-smi; a container needs --gpus all"
    return [Finding("CUDA", usable, says, remedy), *(_card(card, built) for card in found), *_nvml()]


def _card(card: Card, built: list[str]) -> Finding:
    """Returns what does not work on a card."""
    gpu = measured_card(*card[1:])
    said = f"{card.name}, {spoken_bytes(card.memory_bytes or gpu.memory_bytes, 1)}"
    said += f", compute capability {gpu.capability or 'not told'}"
    if gpu.capability and not has_kernels(gpu.capability, built):
        return Finding("card", False, f"{said}: this torch has no kernels for it", OLDER_BUILD)
    lacks = []
    if "MIG" in card.name:
        lacks.append("a slice, whose clocks and power are not told")
    if gpu.before_ampere:
        lacks.append("no bf16 products: its times decide no claim, and attention in bf16 keeps fp32 scores")
    if known_speed(gpu) is None:
        lacks.append(f"its speed is not known: forecasts take that of {speed_of(gpu)[1]}")
    return Finding("card", True, "; ".join([said, *lacks]))


def _nvml() -> list[Finding]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        lacks = f"it cannot be asked ({type(error).__name__}): records lack the peak of the whole card and its clocks"
        remedy = "pip install nvidia-ml-py; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return [Finding("NVML", False, lacks, remedy)]
    return []


def limits() -> list[Finding]:
    """Returns what the system, rather than a card, does not let runs do."""
    found, several = [], len(cards()) > 1
    if WSL in system_name():
        said = "Windows may move a card's memory to the host instead of failing: its runs decide no claim"
        found.append(Finding("WSL2", False, said))
    if several and SHARED_MEMORY.is_dir() and (size := shutil.disk_usage(SHARED_MEMORY).total) < 1e9:
        remedy = "--shm-size=8g, or on Kubernetes an emptyDir with medium: Memory"
        found.append(Finding("shards", False, f"{SHARED_MEMORY} has {spoken_bytes(size, 1)}: NCCL may fail", remedy))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if detect_device() == "cuda" and not (find_compiler("cuda") and header.is_file()):
        remedy = "sudo apt-get install -y gcc python3-dev"
        found.append(Finding("compile", False, f"compile: true needs a C compiler and {header}", remedy))
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        said = "Kaggle keeps at most 20 GB below /kaggle/working, and df does not show it"
        found.append(Finding("disk", Path.cwd().parts[1:3] != ("kaggle", "working"), said, "clone to /tmp"))
    return found


def _bf16() -> list[Finding]:
    from peftscope.training.ceilings import bf16_rates

    return [bf16_finding(chosen_way(), bf16_rates())]


def bf16_finding(way: Way, rates: dict[Way, float]) -> Finding:
    """Returns how products of bf16 matrices are computed here, with the rates of both ways in operations a second."""
    other: Way = "fp32" if way == "native" else "native"
    does = "has" if has_native_bf16() else "has no"
    wish = f", as {VARIABLE} asks" if os.environ.get(VARIABLE) else ""
    gigaflops = {way: f"{rate / 1e9:,.1f} GFLOP/s" for way, rate in rates.items()}
    found = (
        f"this processor {does} instructions for bf16; products of bf16 matrices are computed {HOW[way]}{wish}: "
        f"{gigaflops[way]}, {HOW[other]} {gigaflops[other]}"
    )
    slower = rates[way] < rates[other]
    return Finding(
        "bf16",
        not slower,
        found,
        f"computed {HOW[other]} they are faster here: set {VARIABLE}={other}" if slower else "",
    )


def _pace() -> list[Finding]:
    fields = {"model": "smollm2-135m", "task": "two-digit-sums", "method": {"name": "lora"}, "learning_rate": 1e-3}
    spec = RunSpec.model_validate(fields | {"steps": 160, "device": detect_device()})
    taken = spoken_time(run_seconds(spec))
    return [Finding("pace", True, f"a run of {spec.steps} steps of LoRA on {spec.model} takes about {taken} alone")]


def _bitsandbytes() -> list[Finding]:
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        remedy = "pip install 'bitsandbytes>=0.50', for QLoRA and LoftQ"
        return [Finding("bitsandbytes", False, "not installed", remedy)]
    device = "?"
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        values = torch.linspace(-1, 1, 64, device=device)
        packed, state = quantize_4bit(values, quant_type="nf4")
        error = float((dequantize_4bit(packed, state) - values).abs().max())
    except Exception as reason:  # whatever the native library raises, the user needs one line
        said = f"{found}, but 4-bit fails on {device}: {reason}"
        return [Finding("bitsandbytes", False, next(iter(said.splitlines())), "upgrade bitsandbytes")]
    return [Finding("bitsandbytes", error < 0.2, f"{found}, 4-bit works on {device}")]
