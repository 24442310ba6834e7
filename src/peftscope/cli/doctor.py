"""What this machine can do, and what to do about what is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil

from peftscope.execution.pace import run_seconds
from peftscope.hardware.bf16 import VARIABLE, Way, chosen_way, has_native_bf16
from peftscope.hardware.device import cards, detect_device
from peftscope.spec import RunSpec
from peftscope.words import spoken_bytes, spoken_time

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
    import torch

    from peftscope.training.ceilings import bf16_rates

    found = cards()
    usable = torch.cuda.is_available()
    memory = psutil.virtual_memory().total
    return [
        Finding("processor", True, f"{psutil.cpu_count()} cores, {spoken_bytes(memory, 0)} of memory"),
        Finding(
            "CUDA",
            usable or not found,
            ", ".join(card.name for card in found) if found else "no NVIDIA card; runs use the processor",
            "" if usable or not found else "torch is a CPU build or the driver is too old: reinstall torch with pip",
        ),
        Finding("torch", True, torch.__version__),
        bf16_finding(chosen_way(), bf16_rates()),
        _pace(),
        _bitsandbytes(),
    ]


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


def _pace() -> Finding:
    fields = {"model": "smollm2-135m", "task": "two-digit-sums", "method": {"name": "lora"}, "learning_rate": 1e-3}
    spec = RunSpec.model_validate(fields | {"steps": 160, "device": detect_device()})
    taken = spoken_time(run_seconds(spec))
    return Finding("pace", True, f"a run of {spec.steps} steps of LoRA on {spec.model} takes about {taken} alone")


def _bitsandbytes() -> Finding:
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        return Finding("bitsandbytes", False, "not installed", "pip install 'bitsandbytes>=0.50', for QLoRA and LoftQ")
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-1, 1, 64, device=device)
    try:
        packed, state = quantize_4bit(values, quant_type="nf4")
        error = float((dequantize_4bit(packed, state) - values).abs().max())
    except Exception as reason:  # whatever the native library raises, the user needs one line
        return Finding("bitsandbytes", False, f"{found}, but 4-bit fails on {device}: {reason}", "upgrade bitsandbytes")
    return Finding("bitsandbytes", error < 0.2, f"{found}, 4-bit works on {device}")
