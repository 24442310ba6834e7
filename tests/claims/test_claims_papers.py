"""Claims of papers on memory, curvature and directions, on the toy model and on adapters trained here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ledger_parts import part_of, write_results

from peftscope.analysis.study import HELDOUT
from peftscope.claims.checks import altered_methods, curvature, directions
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.lora_subjects import factor_of, lora_layers, lora_model
from peftscope.claims.measurement import NotRunError
from peftscope.claims.subjects import fetched_model, token_ids
from peftscope.claims.verdict import Verdict
from peftscope.layout import directions_path, run_folder
from peftscope.planning.cells import ARM

# Memory.


@pytest.mark.slow
def test_frozen_factors_and_constant_norms_save_what_they_need_not_keep(toy, monkeypatch) -> None:
    """A norm with a gradient keeps nearly every adapted weight once more, in 16 bits, until the backward pass."""
    run = {"method": "dora", "batch_size": 1, "seq_len": 16, "targets": "mlp"}
    found = altered_methods.saved_by_constant_norm(run, "toy")
    followed, constant = found.evidence.values()
    kept = 1e9 * (float(followed) - float(constant))
    weights = 2 * 2 * 3 * 64 * 192  # bytes, layers, matrices
    assert 0.8 * weights < kept <= weights  # at the peak, a constant norm has one of them too
    dora = part_of("P38", 0, model="toy", run=run)
    dora = dora.model_copy(update={"rule": dora.rule.model_copy(update={"equals": found.value})})
    lora = part_of("P39", 0, model="toy", run={"method": "lora", "seq_len": 64}, batch_sizes=(1, 64))
    before = evaluate_part(lora)
    assert before.found is not None and before.found.curves["ratio"][64.0] > before.found.curves["ratio"][1.0] > 1
    lora = lora.model_copy(update={"rule": lora.rule.model_copy(update={"at_least": 1.01})})
    assert evaluate_part(dora).verdict == evaluate_part(lora).verdict == Verdict.HOLDS
    norm = torch.linalg.norm
    monkeypatch.setattr(torch.linalg, "norm", lambda *args, **kwargs: norm(*args, **kwargs).detach())
    monkeypatch.setattr(altered_methods, "_LoRAWithAFrozen", None)
    assert evaluate_part(dora).verdict == evaluate_part(lora).verdict == Verdict.WRONG


# Curvature.


def test_sharpness_is_the_hessians_largest_eigenvalue(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Ritz value agrees with a Hessian whose eigenvalues are known, and a flatter start flips the claim."""

    class Bowl(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    bowl = Bowl()
    gradient = bowl.weight * torch.tensor([1.0, 5.0, 9.0])
    assert curvature.largest_ritz_value(gradient, [bowl.weight], steps=3) == pytest.approx(9, rel=1e-4)

    given = {"model": "toy", "batches": 2, "items": 2, "steps": 4}
    found = evaluate_part(part_of("P43", 0, **given))
    assert found.found is not None, found.reason
    swapped = evaluate_part(part_of("P43", 0, **given, method="lora", against="pissa"))
    assert swapped.found is not None
    assert float(swapped.found.value) == pytest.approx(1 / float(found.found.value), rel=1e-3)
    assert found.verdict != swapped.verdict


def test_rates_that_fall_with_the_sharpness_support_p56_and_others_do_not(monkeypatch, in_repository) -> None:
    """The published best rates stand against sharpness that is made to follow them, or to oppose them."""

    def found(sharpness: Callable[[str], float]) -> PartFinding:
        monkeypatch.setattr(curvature, "_sharpness", lambda spec, *_: [sharpness(spec.method.name)])
        return evaluate_part(part_of("P56"))

    first = found(lambda name: float(len(name)))
    assert first.found is not None, first.reason
    rates = {name: float(first.found.evidence[f"best rate of {name}"]) for name in part_of("P56").with_["arms"]}
    falling, rising = found(lambda name: 1 / rates[name]), found(lambda name: rates[name])
    assert falling.found.value == pytest.approx(-1) and rising.found.value == pytest.approx(1)
    assert falling.verdict != rising.verdict


# Directions of trained adapters.


def train_adapter(run: str, rank: int, seed: int, aim: torch.Tensor | None) -> None:
    """Trains LoRA on the toy model's loss, or towards a fixed update of rank one, and saves it as a run does."""
    model = lora_model(fetched_model("toy", "AutoModelForCausalLM"), rank=rank, seed=seed)
    layers = lora_layers(model).values()
    optimizer = torch.optim.Adam([factor_of(layer, letter) for layer in layers for letter in "AB"], lr=0.02)
    ids = token_ids(model)
    for _ in range(60 if aim is not None else 3):
        optimizer.zero_grad()
        if aim is None:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            aimed = [layer for layer in layers if factor_of(layer, "A").shape[1] == len(aim)]
            updates = [layer.scaling["default"] * factor_of(layer, "B") @ factor_of(layer, "A") for layer in aimed]
            loss = sum((update - torch.outer(torch.ones(len(update)), aim)).square().sum() for update in updates)
        loss.backward()
        optimizer.step()
    model.save_pretrained(run_folder(run) / "adapter")


def write_study(aim: torch.Tensor | None) -> None:
    rows = [{"run_id": "base", "method": "none", "base_weights": "full", "seed": 0, "comparisons": ""}]
    for arm, rank in {"lora": 8, "r4": 4, "r64": 16}.items():
        for seed in range(3):
            run = f"{arm}-s{seed}"
            train_adapter(run, rank, seed, aim)
            rows.append({"run_id": run, "method": "lora", "base_weights": "full", "seed": seed})
            rows[-1]["comparisons"] = f"{ARM}{arm}"
    write_results("ranks", rows, model="toy", task="sums", status="ok", **{HELDOUT: 1.0})


@pytest.mark.slow
def test_adapters_in_a_common_direction_share_it_and_others_do_not(toy, tmp_path, monkeypatch) -> None:
    for name in ("resources", "experiments"):
        (tmp_path / name).symlink_to(toy / name)
    monkeypatch.chdir(tmp_path)
    update, amplified = part_of("P46", 0, of="update"), part_of("P47", 0, arm="r4")
    write_study(aim=None)
    apart, small = evaluate_part(update), evaluate_part(amplified)
    assert apart.verdict == small.verdict == Verdict.WRONG, (apart.reason, small.reason)
    stored = json.loads(directions_path("ranks").read_text())
    assert len(stored) == 2 and set(next(iter(stored.values()))) == {"0", "1", "2"}

    directions_path("ranks").unlink()
    write_study(aim=torch.eye(64)[5])
    together, large = evaluate_part(update), evaluate_part(amplified)
    assert (together.verdict, large.verdict) == (Verdict.HOLDS, Verdict.HOLDS), (together.found, large.found)

    # What is kept of the adapters gives the same without them.
    shutil.rmtree(run_folder("lora-s0") / "adapter")
    assert evaluate_part(update).to_json() == together.to_json()
    directions_path("ranks").unlink()
    with pytest.raises(NotRunError, match="lora-s0"):
        directions.shared_direction("ranks", "lora", "r64", ["q_proj"], "A", 1)
