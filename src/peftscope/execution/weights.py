"""Measures the weights that a run keeps along its training: their updates, cut and set to zero, and evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file

from peftscope.data.batching import Example, tokenise
from peftscope.data.sources import Item
from peftscope.errors import InputError, Problem
from peftscope.evaluation import updates
from peftscope.evaluation.heldout import heldout_nll, mean_nll
from peftscope.execution.start import merged_start
from peftscope.hardware.bf16 import bf16_products
from peftscope.record import kept_path, measured_path, read_record
from peftscope.spec import RunSpec
from peftscope.training.build import build_model
from peftscope.training.load import attention, load_base, load_tokenizer

WHOLE = 10**6
"""Stands for no cut: a rank above that of every matrix."""
CUT_RANKS = (1, 2, 4, 8, 16, 32, 64, WHOLE)
WORTH_ITEMS = 128
"""The held-out items on which the worth of single updates is measured, one matrix after the other."""
AMPLIFIED_RANK = 8
"""The directions of an update that has no rank of its own, for its amplification."""


def measure_weights(folder: Path) -> None:
    """Writes ``weights.csv`` into a run's folder: one row for each kept step and matrix, and one for each cut.

    Every update has its size over the weight's, its spectrum, and the changes of magnitude and direction. After the
    last kept step there are also its intruders, its amplification and the spectra of noise. Updates of full fine-tuning
    are cut to lower ranks, and those of AdaLoRA set to zero one by one; both are evaluated on held-out items. A run
    that diverged has no rows.

    Raises:
        InputError: The run has no kept weights, or its method has updates of another form.
    """
    record = read_record(folder / "record.json")
    # On the processor also for a run on a card: no card is reserved for this.
    kernel = "sdpa" if record.spec.attention == "flash_attention_2" else record.spec.attention
    spec = record.spec.model_copy(update={"device": "cpu", "attention": kernel})
    kept = sorted(path for path in kept_path(folder, 0).parent.glob("*.safetensors"))
    if record.status == "ok" and not kept:
        remedy = f"remove {folder} and repeat the run, with keep_at in its experiment"
        raise InputError(Problem(f"run {record.run_id}", "keeps no weights along its training", remedy))
    if not (spec.method.trains_base or spec.method.plain_update):
        message = f"the updates of {spec.method.label} cannot be measured"
        raise InputError(Problem(f"run {record.run_id}", message, "keep weights of full, lora, dora or adalora"))
    rows: list[dict[str, Any]] = []
    if record.status == "ok":
        with bf16_products(), torch.no_grad():
            base = merged_start(load_base(spec), spec)
            before = {name: p.detach().clone() for name, p in base.named_parameters()}
            model = build_model(base, spec).model.eval()
            for path in kept:
                model.load_state_dict(load_file(path), strict=False)  # what was trained alone is in the file
                rows += _rows_of(model, before, spec, int(path.stem.rpartition("-")[2]), path == kept[-1])
            if spec.method.trains_base:
                rows += _cuts(model, before, spec, folder)
            if hasattr(spec.method, "kept_ranks"):
                _add_worth(rows, model, spec, folder)
    unfinished = measured_path(folder).with_suffix(".unfinished")
    pd.DataFrame(rows, columns=None if rows else ["kind"]).to_csv(unfinished, index=False, float_format="%.6g")
    unfinished.replace(measured_path(folder))


def _rows_of(
    model: Any, before: dict[str, torch.Tensor], spec: RunSpec, step: int, is_last: bool
) -> Iterator[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    gaussian: dict[torch.Size, dict[str, float]] = {}
    for name, old, new in updates.updated_matrices(model, before):
        update = new - old
        magnitude, direction = updates.decomposed_change(old, new)
        row: dict[str, Any] = {
            **{"kind": "matrix", "step": step, "matrix": name, "module": name.rpartition(".")[2]},
            **{"rows": old.shape[0], "columns": old.shape[1], "relative_size": float(update.norm() / old.norm())},
            **updates.spectrum(updates.energies(update)),
            **{"magnitude_change": magnitude, "direction_change": direction},
        }
        if is_last:
            if old.shape not in gaussian:
                gaussian[old.shape] = updates.spectrum(updates.energies(torch.randn(old.shape, generator=random)))
            noise = updates.spectrum(updates.energies(updates.grid_noise(old, random)))
            row |= {f"gaussian_{key}": value for key, value in gaussian[old.shape].items()}
            row |= {f"grid_{key}": value for key, value in noise.items()}
            for cosine, count in zip(updates.COSINES, updates.intruders(old, new), strict=True):
                row[f"intruders_{100 * cosine:.0f}"] = count
            rank = getattr(spec.method, spec.method.rank_field, AMPLIFIED_RANK)
            row["amplification"] = updates.amplification(old, update, rank) if update.any() else None
        yield row


def _cuts(model: Any, before: dict[str, torch.Tensor], spec: RunSpec, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the held-out loss with all updates of matrices cut to each of ``CUT_RANKS``. Vectors keep theirs."""
    examples, pad = _heldout(spec, folder)
    changes = {name: p.data - before[name] for name, p in model.named_parameters() if p.ndim == 2}
    directions = {name: updates.leading_directions(update, max(CUT_RANKS[:-1])) for name, update in changes.items()}
    parameters = dict(model.named_parameters())
    for rank in CUT_RANKS:
        for name, update in changes.items():
            kept = update if rank >= min(update.shape) else updates.cut(update, directions[name][:, :rank])
            parameters[name].data.copy_(before[name] + kept)
        yield {"kind": "cut", "cut_rank": rank, "heldout_nll": _loss(model, examples, spec, pad)}


def _add_worth(rows: list[dict[str, Any]], model: Any, spec: RunSpec, folder: Path) -> None:
    """Adds to each matrix of the last step the rank that it kept, and the rise of the loss without its update."""
    examples, pad = _heldout(spec, folder, WORTH_ITEMS)
    whole = _loss(model, examples, spec, pad)
    method: Any = spec.method
    ranks = method.kept_ranks(model)
    modules = dict(model.named_modules())
    last = max(row["step"] for row in rows)
    for row in rows:
        if row["step"] != last:
            continue
        module = modules[f"base_model.model.{row['matrix']}"]
        module.scaling["default"], scale = 0.0, module.scaling["default"]
        row["worth"] = _loss(model, examples, spec, pad) - whole
        row["rank_kept"] = ranks[row["matrix"]]
        module.scaling["default"] = scale


def _heldout(spec: RunSpec, folder: Path, items: int | None = None) -> tuple[list[Example], int]:
    """Returns the first items that a run was judged on, tokenised, and the padding token."""
    tokenizer = load_tokenizer(spec)
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()[:items]]
    judged = [Item(row["prompt"], row["target"]) for row in rows]
    return tokenise(judged, tokenizer, spec.seq_len), tokenizer.pad_token_id


def _loss(model: Any, examples: list[Example], spec: RunSpec, pad: int) -> float:
    with attention(model, spec.attention):
        return mean_nll(heldout_nll(model, examples, spec, pad))
