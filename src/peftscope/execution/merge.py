"""Merges a finished run's adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, close_match
from peftscope.execution.start import ADAPTER, merged_start
from peftscope.layout import RUNS, how_to_run, record_paths, run_folder
from peftscope.record import read_record
from peftscope.spec import RunSpec


def find_run(run: str) -> Path:
    """Returns the folder of a finished run that has its weights.

    Raises:
        InputError: There is no such run, it did not end ``ok``, or its weights are gone.
    """
    folder, known = run_folder(run), [path.parent.name for path in record_paths()]
    if run not in known:
        remedy = close_match(run, known) or f"{how_to_run('quick')} makes some"
        raise InputError(Problem(f"run {run}", f"no such run in {RUNS}", remedy))
    if (status := read_record(folder / "record.json").status) != "ok" or not (folder / "adapter").is_dir():
        why = "has no weights: they were dropped, or did not come with `restore`" if status == "ok" else f"is {status}"
        raise InputError(Problem(f"run {run}", why, f"remove {folder} and repeat the run with --keep-weights all"))
    return folder


def merge_run(folder: Path, target: Path) -> None:
    """Writes the merged model and its tokenizer.

    A 4-bit base is dequantised first, and the adapter is added in bf16. This is the trained model at full size. (To add
    the adapter in 4 bits would quantise the sum a second time and give another model.)

    Raises:
        InputError: The method cannot be merged, or the run has no adapter.
    """
    import torch
    from peft import PeftModel

    from peftscope.training.load import load_tokenizer

    spec = read_record(folder / "record.json").spec
    if not (spec.method.mergeable and (folder / ADAPTER).is_file()):
        why = f"{spec.method.label} cannot be merged" if not spec.method.mergeable else f"no {Path(ADAPTER).name}"
        raise InputError(Problem(f"run {folder.name}", why, "load its adapter/ folder as it is"))
    base = base_of_adapter(spec.model_copy(update={"device": "cuda" if torch.cuda.is_available() else "cpu"}))
    base = base.dequantize() if spec.method.quantization() else base
    base.set_attn_implementation("sdpa")
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(target)
    load_tokenizer(spec).save_pretrained(target)


def base_of_adapter(spec: RunSpec) -> Any:
    """Returns the base that a spec's adapter is loaded onto.

    For LoftQ this is a rebuilt base of the run's own, and it has the adapter of an earlier run that was merged first.
    """
    from peftscope.training.build import build_model
    from peftscope.training.load import load_base

    base = merged_start(load_base(spec), spec)
    return build_model(base, spec).model.unload() if spec.method.has_own_base else base
