"""Starts a run where another one ended.

An adapter trains on, or it is merged and a fresh one begins. The weights of full fine-tuning take the base's place.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.files.manifest import file_sha256
from peftscope.layout import run_folder
from peftscope.record import read_record
from peftscope.spec import RunSpec

ADAPTER = "adapter/adapter_model.safetensors"
MODEL = "adapter/model.safetensors"


def merged_start(base: Any, spec: RunSpec) -> Any:
    """Returns the base with the result of the run that a spec starts from in it, if the spec asks for that.

    PEFT adds an adapter's update in the base's own precision. Weights of full fine-tuning are rounded to it.

    Raises:
        InputError: The run that it starts from has no sound weights.
    """
    if spec.start_from is None or spec.start_as != "merged":
        return base
    path = _trained_weights(spec.start_from)
    if path.name == Path(MODEL).name:
        from safetensors.torch import load_model

        load_model(base, path)
        return base
    from peft import PeftModel

    merged = PeftModel.from_pretrained(base, path.parent).merge_and_unload()
    merged.requires_grad_(False)
    return merged


def continue_adapter(model: Any, spec: RunSpec) -> None:
    """Gives a model's adapter the weights of the run that its spec starts from, if the spec asks for that.

    Raises:
        InputError: The run that it starts from has no sound adapter, or one of another shape.
    """
    if spec.start_from is None or spec.start_as != "adapter":
        return
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = _trained_weights(spec.start_from)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings(action="ignore"):  # of base weights, which an adapter does not have
        loaded = set_peft_model_state_dict(model, load_file(path))
    if loaded.unexpected_keys or expected & set(loaded.missing_keys):
        raise InputError(Problem(str(path), "does not have the tensors of this run's adapter", "choose another start"))


def start_provenance(spec: RunSpec) -> dict[str, Any] | None:
    """Returns what a run starts from: the other run, how, and the checksum of its weights; None: the base alone."""
    if spec.start_from is None:
        return None
    return {"run_id": spec.start_from, "as": spec.start_as, "sha256": file_sha256(_trained_weights(spec.start_from))}


def _trained_weights(run: str) -> Path:
    """Returns the file with a run's adapter, or with all weights if it trained them.

    Raises:
        InputError: The run has none, or it is not the one that the run wrote.
    """
    folder = run_folder(run)
    remedy = f"remove {folder} and make that run again"
    name = next((name for name in (ADAPTER, MODEL) if (folder / name).is_file()), None)
    if name is None:
        raise InputError(Problem(f"start_from={run}", f"there are no weights in {folder / 'adapter'}", remedy))
    if read_record(folder / "record.json").files.get(name) != file_sha256(folder / name):
        raise InputError(Problem(f"start_from={run}", "its weights are not those that it saved", remedy))
    return folder / name
