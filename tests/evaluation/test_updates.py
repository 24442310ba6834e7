"""Updates of weights: their spectra and directions against plain decompositions, and what is measured on a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import run_here

from peftscope.errors import InputError
from peftscope.evaluation import updates
from peftscope.execution.weights import WHOLE, measure_weights
from peftscope.record import kept_path, measured_path, write_record
from peftscope.training.build import build_model
from peftscope.training.load import load_base

SHAPES = [(12, 30), (30, 12), (16, 16)]


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_spectra_and_cuts_are_those_of_a_decomposition(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    u, s, v = (part.float() for part in torch.linalg.svd(matrix.double(), full_matrices=False))
    torch.testing.assert_close(updates.energies(matrix).float(), s**2)
    for mine, theirs in zip(updates.singular_vectors(matrix), (u, v.T), strict=True):
        cosines = (mine.T @ theirs.double()).diagonal().abs()
        torch.testing.assert_close(cosines, torch.ones(len(s)).double(), rtol=1e-5, atol=0)
    found = updates.cut(matrix, updates.leading_directions(matrix, 3))
    torch.testing.assert_close(found, u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-4)
    told = updates.spectrum(updates.energies(matrix))
    shares = (s**2).cumsum(0) / (s**2).sum()
    assert told["rank_90"] == int((shares < 0.9).sum()) + 1
    assert told["energy_4"] == pytest.approx(float(shares[3]))
    low_rank = updates.spectrum(updates.energies(matrix[:, :2] @ matrix[:2, :]))
    assert low_rank["rank_90"] <= 2 and low_rank["energy_2"] == pytest.approx(1)
    assert updates.spectrum(updates.energies(0 * matrix)) == {"rank_90": 0, "stable_rank": 0.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_intruder_is_a_leading_vector_that_resembles_none_before(shape: tuple[int, int]) -> None:
    before = torch.diag_embed(torch.linspace(2, 1, min(shape)))
    before = torch.nn.functional.pad(before, (0, shape[1] - min(shape), 0, shape[0] - min(shape)))
    assert updates.intruders(before, 3 * before) == [0, 0, 0]
    even = torch.ones(shape[0], 1) / shape[0] ** 0.5
    new = before + 50 * even @ torch.ones(1, shape[1]) / shape[1] ** 0.5
    # Its cosine with every old vector is 1 over the root of the rows: 0.29, 0.18 and 0.25.
    assert updates.intruders(before, new)[0] == 1
    old, found = torch.linalg.svd(before)[0][:, : min(shape)], torch.linalg.svd(new)[0][:, :10]
    nearest = (old.T @ found).abs().amax(dim=0)
    assert updates.intruders(before, new)[1:] == [int((nearest < c).sum()) for c in (0.5, 0.7)]


def test_an_update_amplifies_directions_that_the_weight_has_little_of() -> None:
    before = torch.diag(torch.tensor([10.0, 1.0, 0.1, 5.0]))
    update = torch.zeros(4, 4)
    update[2, 2] = 3.0
    assert updates.amplification(before, update, 1) == pytest.approx(30)
    assert updates.amplification(before, 2 * update, 1) == pytest.approx(60)
    assert updates.amplification(before, update + 4 * torch.diag(torch.tensor([1.0, 0, 0, 0])), 1) == pytest.approx(0.5)


def test_magnitude_and_direction_change_apart() -> None:
    before = random_matrix(8, 5)
    magnitude, direction = updates.decomposed_change(before, 1.5 * before)
    assert magnitude == pytest.approx(0.5 * float(before.norm(dim=1).mean()))
    assert direction == pytest.approx(0, abs=1e-12)
    magnitude, direction = updates.decomposed_change(before, before.roll(1, dims=1))
    assert magnitude == pytest.approx(0, abs=1e-6) and direction > 0.1


def test_the_noise_of_a_grid_is_uniform_within_half_a_step_of_each_block() -> None:
    weight = random_matrix(64, 64)
    weight[:, 32:] *= 10
    noise = updates.grid_noise(weight, torch.Generator().manual_seed(0))
    step = (weight[:, :32].amax(1) - weight[:, :32].amin(1)) / 15
    inside = noise[:, :32].abs() / step[:, None]
    assert 0.49 < float(inside.max()) <= 0.5 and float(inside.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(noise[:, 32:].norm() / noise[:, :32].norm()) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "rslora"])
def test_an_update_is_what_peft_merges(method: str, toy: Path, make_spec: Any) -> None:
    spec = make_spec(method=method, precision="fp32")
    base = load_base(spec)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = build_model(base, spec).model
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        found = {name: (old, new) for name, old, new in updates.updated_matrices(model, before)}
        merged = dict(model.merge_and_unload().named_parameters())
    assert len(found) == 14 and all(".layers." in name for name in found)
    for name, (old, new) in found.items():
        assert torch.equal(old, before[f"{name}.weight"]) and not torch.equal(old, new)
        torch.testing.assert_close(new, merged[f"{name}.weight"])


def test_weights_of_full_fine_tuning_are_measured_and_cut(toy: Path, make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(method="full", precision="amp", generation_items=0, learning_rate=1e-3)
    record = run_here(spec, tmp_path, keep_at=(0.5, 1))
    measure_weights(tmp_path)
    table = pd.read_csv(measured_path(tmp_path))
    matrices, cuts = table[table["kind"] == "matrix"], table[table["kind"] == "cut"].set_index("cut_rank")
    assert matrices.groupby("step").size().to_dict() == {3: 14, 6: 14}
    assert (matrices["relative_size"] > 0).all()
    assert matrices.groupby("step")["relative_size"].mean().is_monotonic_increasing
    last = matrices[matrices["step"] == 6]
    needed = ["intruders_50", "amplification", "gaussian_rank_90", "grid_rank_90", "energy_8", "direction_change"]
    assert last[needed].notna().all(axis=None)
    # The same evaluation gives the same loss, and the more is cut away, the less is left of what was learned.
    assert cuts["heldout_nll"][WHOLE] == pytest.approx(record.quality.heldout_nll, rel=1e-5)
    assert cuts["heldout_nll"][1] > cuts["heldout_nll"][8] > cuts["heldout_nll"][WHOLE]

    # The weights of a run on a card are measured on the processor as well.
    card = record.spec.model_copy(update={"device": "cuda", "attention": "flash_attention_2"})
    write_record(tmp_path / "record.json", record.model_copy(update={"spec": card}))
    measure_weights(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(measured_path(tmp_path)), table)


@pytest.mark.slow
def test_the_worth_of_adaloras_updates_is_measured_apart_from_its_ranks(toy, make_spec, tmp_path) -> None:
    spec = make_spec(method="adalora", steps=8, generation_items=0, learning_rate=3e-2)
    record = run_here(spec, tmp_path, keep_at=(0.5, 1))
    measure_weights(tmp_path)
    table = pd.read_csv(measured_path(tmp_path))
    last = table[table["step"] == 8]
    assert last["rank_kept"].sum() == record.method_metrics["final_rank_sum"] and last["rank_kept"].nunique() > 1
    assert last["worth"].nunique() > 3 and table[table["step"] < 8]["worth"].isna().all()
    pruned = last[last["rank_kept"] == 0]
    assert (pruned["worth"] == 0).all() and (pruned["relative_size"] == 0).all()


def test_a_run_without_what_is_measured_says_so(toy: Path, make_spec: Any, tmp_path: Path) -> None:
    run_here(make_spec(method="lora", steps=2, generation_items=0), tmp_path / "none")
    with pytest.raises(InputError, match="keeps no weights along its training"):
        measure_weights(tmp_path / "none")
    spec = make_spec(method="ia3", steps=2, generation_items=0)
    run_here(spec, tmp_path / "ia3", keep_at=(0.5, 1))
    assert kept_path(tmp_path / "ia3", 2).is_file()
    with pytest.raises(InputError, match="the updates of IA³ cannot be measured"):
        measure_weights(tmp_path / "ia3")
