"""The memory calculator's speed, beside what accelerate estimates: ``make benchmark-memory``.

The aims: the closed form under 0.3 s of processor time for a whole process; the simulation, after its imports, under
8 s of processor time for LoRA on llama-2-7b, and under 30 s and 2 GiB of real memory for QLoRA on llama-65b.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from peftscope.execution.libraries import without_hub_kernels
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.words import GIB

JOBS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-2-7b", {"method": "lora"}),
    ("llama-2-7b", {"method": "full"}),
    ("llama-2-7b", {"method": "qlora"}),
    ("llama-65b", {"method": "qlora", "checkpointing": True}),
)
"""Models and options; all with one sequence of 512 tokens."""
SIZES = {"batch_size": 1, "seq_len": 512}


def time_formula(model: str, options: dict[str, Any]) -> tuple[float, int]:
    """Returns (processor seconds, allocated peak in bytes) of the closed form, by the command in a fresh process.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    command = [sys.executable, "-m", "peftscope", "memory", model, "--json"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, json.loads(output)["peak_allocated_bytes"]


def time_simulation(model: str, options: dict[str, Any]) -> dict[str, float]:
    """Simulates in this process, which should be a fresh one, and asks accelerate about the same model.

    Returns:
        Of the simulation: ``seconds`` of the processor after imports, allocated ``peak`` in bytes, and the process's
        own ``resident`` peak and how much of it was ``added``, in bytes. Of accelerate: ``weights`` and ``training``
        (Adam, fp32) in bytes.
    """
    import torch
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    from peftscope.memory.simulate import answer_by_simulation

    question = ask(describe_model(model), options)
    fields = dict(question.model.config)
    family = fields.pop("model_type")
    for late in ("peft", "bitsandbytes", f"transformers.models.{family}.modeling_{family}"):
        import_module(late)
    before, began = psutil.Process().memory_info().rss, time.process_time()
    answer = answer_by_simulation(question)
    seconds = time.process_time() - began
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        # As accelerate's command builds it: without a head, in fp32.
        base = AutoModel.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
    weights, _ = calculate_maximum_sizes(base)
    return {
        "seconds": seconds,
        "peak": answer.peak_allocated_bytes,
        "resident": resident,
        "added": max(0, resident - before),
        "weights": weights,
        "training": max(estimate_training_usage(weights, "float32").values()),
    }


@without_hub_kernels()
def main() -> None:
    """Times every job and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    one = parser.parse_args().one
    if one:
        print(json.dumps(time_simulation(*one)))
        return
    table = Table("job (1 x 512 tokens)", "", "processor s", "peak GiB", "real memory GiB (added)", box=None)
    for model, options in track(JOBS, console=Console(stderr=True), description="measuring"):
        options = SIZES | options
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.calculator", "--one"]
        output = subprocess.run([*command, json.dumps([model, options])], check=True, stdout=subprocess.PIPE).stdout
        found = json.loads(output.splitlines()[-1])
        seconds, peak = time_formula(model, options)
        name = f"{model} {options['method']}" + (", checkpointing" if options.get("checkpointing") else "")
        real = f"{found['resident'] / GIB:.2f} ({found['added'] / GIB:.2f})"
        table.add_row(name, "closed form, whole process", f"{seconds:.2f}", f"{peak / GIB:.2f}", "")
        table.add_row("", "simulation, after imports", f"{found['seconds']:.1f}", f"{found['peak'] / GIB:.2f}", real)
        table.add_row("", "accelerate: weights, fp32", "", f"{found['weights'] / GIB:.2f}", "")
        table.add_row("", "accelerate: training with Adam, fp32", "", f"{found['training'] / GIB:.2f}", "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
