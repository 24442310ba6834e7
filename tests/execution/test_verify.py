"""Published runs that are run again: what counts as equal, and what a difference means."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here

from peftscope.errors import InputError
from peftscope.execution.verify import choose_published, compare_records, repeat_runs
from peftscope.layout import PUBLISHED_RESULTS, run_folder
from peftscope.planning.published import write_runs
from peftscope.planning.sweep import expand
from peftscope.record import RunRecord, read_record, write_record

SHORT = "fixed: {model: toy, steps: 2, batch_size: 4, heldout_items: 8, generation_items: 0, retention_tokens: 0}\n"


@pytest.fixture
def published(own: Any, peftscope) -> RunRecord:
    """An experiment `mine` with one published run, which ran in a process of its own."""
    own("mine", SHORT + "runs: [{method: lora}]\n")
    assert peftscope("sweep", "mine")[0] == 0
    (identity,) = expand("mine").runs
    write_runs(PUBLISHED_RESULTS / "mine", [run_folder(identity)])
    return read_record(run_folder(identity) / "record.json")


@pytest.mark.slow
def test_a_run_gives_its_published_numbers_again_and_others_fail(published: RunRecord, peftscope) -> None:
    (repeat,) = repeat_runs(choose_published(["mine"], None, 0))
    assert repeat.run == published.run_id and repeat.is_equal and not repeat.elsewhere
    assert set(repeat.equal) == {"losses", "scores", "weights", "peaks"}
    with pytest.raises(InputError, match="minne: has no published runs -> did you mean `mine`"):
        choose_published(["minne"], None, 0)
    published.train_nll[1] *= 1 + 1e-6
    write_record(run_folder(published.run_id) / "record.json", published)
    write_runs(PUBLISHED_RESULTS / "mine", [run_folder(published.run_id)])
    code, *said = peftscope("verify", "mine", "--runs", "1")
    assert code == 1 and "within 1.0e-06" in "".join(said) and "differ although the machine" in "".join(said)


@pytest.mark.slow
def test_a_run_that_starts_from_another_needs_its_weights(own: Any, peftscope) -> None:
    own("mine", SHORT + "runs: [{method: lora, start_from: {steps: 3}}]\n")
    assert peftscope("sweep", "mine")[0] == 0
    start, run = (run for run in expand("mine").runs)
    write_runs(PUBLISHED_RESULTS / "mine", [run_folder(start), run_folder(run)])
    shutil.rmtree(run_folder(start) / "adapter")
    code, *said = peftscope("verify", "mine")
    assert "1 of 2 runs start from others whose weights are not in the store, and are left out" in "".join(said)
    assert code == 0 and "1 of 1 runs are equal" in "".join(said)


def test_a_difference_on_another_processor_is_no_failure(toy: Path, make_spec: Any, tmp_path: Path) -> None:
    published = run_here(make_spec(method="lora", steps=2, generation_items=0, retention_tokens=0), tmp_path)
    here = published.model_copy(deep=True)
    here.quality.heldout_nll = 1.01 * (published.quality.heldout_nll or 0)
    here.provenance["hardware"]["cpu"] = "another"
    repeat = compare_records("mine", published, here)
    assert not repeat.is_equal and not repeat.is_failure and "processor" in repeat.elsewhere
    assert repeat.largest["scores"] == pytest.approx(0.01 / 1.01) and repeat.equal["losses"]
    here.provenance = published.provenance
    assert compare_records("mine", published, here).is_failure
