"""Merges a finished run's adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, close_match
from peftscope.execution.start import merged_start
from peftscope.layout import RUNS, how_to_run, record_paths, run_folder
from peftscope.record import is_restored, read_record
from peftscope.spec import RunSpec


def find_run(run: str) -> Path:
    """Returns the folder of a finished run that has its weights.

    Raises:
        InputError: There is no such run, it did not end ``ok``, or its weights are gone.
    """
    folder = run_folder(run)
    if not (folder / "record.json").is_file():
        known = [path.parent.name for path in record_paths()]
        remedy = close_match(run, known) or f"{how_to_run('quick')} makes some"
        raise InputError(Problem(f"run {run}", f"no such run in {RUNS}", remedy))
    record = read_record(folder / "record.json")
    if record.status != "ok":
        raise InputError(Problem(f"run {run}", f"its status is {record.status}", "choose a run with the status ok"))
    if is_restored(folder) or record.weights == "dropped":
        why = "it was restored without its weights" if is_restored(folder) else "its weights were dropped when it ended"
        raise InputError(Problem(f"run {run}", why, f"remove {folder} and repeat the run with --keep-weights all"))
    return folder


def merge_run(folder: Path, target: Path) -> None:
    """Writes the merged model and its tokenizer.

    A 4-bit base is dequantised first, and the adapter is added in bf16. This is the trained model at full size. (To add
    the adapter in 4 bits would quantise the sum a second time and give another model.)

    Raises:
        InputError: The method cannot be merged, or the run has no adapter.
    """
    record = read_record(folder / "record.json")
    method = record.spec.method
    if not method.mergeable:
        raise InputError(
            Problem(f"run {record.run_id}", f"{method.label} cannot be merged", "load its adapter/ folder as it is")
        )
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise InputError(Problem(str(folder / "adapter"), "no adapter_model.safetensors", "repeat the run"))
    import torch
    from peft import PeftModel

    from peftscope.training.load import load_tokenizer

    spec = record.spec.model_copy(update={"device": "cuda" if torch.cuda.is_available() else "cpu"})
    base = base_of_adapter(spec)
    if spec.method.quantization():
        base = base.dequantize()
    base.set_attn_implementation("sdpa")
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(target)
    load_tokenizer(record.spec).save_pretrained(target)


def base_of_adapter(spec: RunSpec) -> Any:
    """Returns the base that a spec's adapter is loaded onto.

    For LoftQ this is a rebuilt base of the run's own, and it has the adapter of an earlier run that was merged first.
    """
    from peftscope.training.build import build_model
    from peftscope.training.load import load_base

    base = merged_start(load_base(spec), spec)
    return build_model(base, spec).model.unload() if spec.method.has_own_base else base
