"""A few steps in every world that is not the toy's: the second task, and the second model where it was fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_here

from peftscope.data.tasks import make_task
from peftscope.models.catalog import model_folder
from peftscope.models.fetch import fetch_model
from peftscope.planning.experiment import read_experiment


@pytest.mark.slow
@pytest.mark.parametrize("study", ["pronunciation", "pronunciation-gemma"])
def test_three_steps_in_a_world(study: str, repository: Path, workspace: Path, make_spec, tmp_path: Path) -> None:
    fixed = read_experiment(Path(f"experiments/studies/{study}.yaml")).fixed
    world = {"model": fixed["model"], "task": fixed["task"]}
    if world["model"].startswith("gemma"):  # whoever fetches it agrees to its terms
        fetched = repository / model_folder(world["model"])
        if not (fetched / "manifest.json").is_file():
            pytest.skip(f"{world['model']} was not fetched")
        if not model_folder(world["model"]).exists():
            model_folder(world["model"]).symlink_to(fetched)
    fetch_model(world["model"])
    make_task(world["task"])
    sizes = {
        "steps": 3,
        "batch_size": 16,
        "warmup_steps": 0,
        "schedule": "constant",
        "heldout_items": 16,
        "eval_batch_size": 16,
    }
    spec = make_spec(method="lora", learning_rate=1e-3, retention_tokens=300, generation_items=2, **world, **sizes)
    record = run_here(spec, tmp_path / "run")
    assert (record.status, record.reason) == ("ok", None)
    assert record.train_nll[2] < record.train_nll[0]
    # The base writes English: less than two bits for each byte.
    assert 0.5 < record.quality.retention_bits_per_byte_before < 2
    memory = record.memory
    assert memory.predicted.train_peak_tensor_bytes == memory.train.peak_tensor_bytes > 0
    assert memory.predicted.evaluate_peak_tensor_bytes == memory.evaluate.peak_tensor_bytes > 0
