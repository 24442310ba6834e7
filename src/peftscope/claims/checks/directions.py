"""The directions of trained adapters: which of them two ranks share, and how far they amplify the weights.

The adapters of a study's runs are read from the store. What a check needs of them, one number a seed, is kept in
``directions.json`` of the study's results, which is published. So a clone without adapters comes to the same verdict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from safetensors import safe_open

from peftscope.analysis.study import StudyResults
from peftscope.claims.measurement import Measurement, NotRunError, geometric_mean_of, mean_of, runs_of
from peftscope.claims.subjects import weight_matrices
from peftscope.files.atomic import write_json
from peftscope.layout import directions_path, published, run_folder

Factors = dict[str, tuple["torch.Tensor", "torch.Tensor", float]]
"""A (rank, inputs), B (outputs, rank) and the scale of each adapted matrix, by its name in the base."""


def shared_direction(
    study: str, arm: str, against: str, modules: list[str], of: Literal["A", "update"], index: int
) -> Measurement:
    """Returns how much of an arm's direction lies in as many leading directions of another arm, mean over matrices.

    Directions are right singular vectors. The value is the squared length of the projection, from 0 to 1; for the first
    direction it is the squared cosine. One value for each seed that both arms have.
    Source: Hu et al. 2021, arXiv 2106.09685, section 7.2.

    Args:
        of: The directions of the factor A, as in the source, or of the update B A.
        index: Which direction, from 1.
    """

    def projection(first: Factors, second: Factors, _: str) -> float:
        shares = []
        for name in _named(first, modules):
            mine, other = (_directions(*factors[name], of) for factors in (first, second))
            shares.append(float((other[:index] @ mine[index - 1]).square().sum()))
        return sum(shares) / len(shares)

    by_seed = _by_seed(study, (arm, against), f"{of} {index} of {', '.join(modules)}", projection)
    return mean_of(list(by_seed.values()), samples=tuple(by_seed.values()), **_about(study, (arm, against)))


def amplification(study: str, arm: str, modules: list[str], over: str = "") -> Measurement:
    """Returns the factor by which an arm's update amplifies the weights in its own directions, one value a seed.

    It is ‖ΔW‖ / ‖Uᵀ W V‖ (Frobenius), where U and V are the left and right singular vectors of ΔW: the geometric mean
    over matrices and seeds. Source: Hu et al. 2021, arXiv 2106.09685, section 7.3 and table 7.

    Args:
        over: Another arm. With one, the value is the arm's factor over this arm's.
    """

    def logarithm(factors: Factors, _: Factors, model: str) -> float:
        logs, weights = [], dict(weight_matrices(model))
        for name in _named(factors, modules):
            a, b, scale = factors[name]
            left, right = torch.linalg.qr(b).Q, torch.linalg.qr(a.T).Q  # they span what U and V span
            logs.append(math.log(float((scale * b @ a).norm() / (left.T @ weights[name] @ right).norm())))
        return sum(logs) / len(logs)

    key = f"amplification of {', '.join(modules)}"
    own, *others = (_by_seed(study, (each, each), key, logarithm) for each in filter(None, (arm, over)))
    logs = [log - sum(other[seed] for other in others) for seed, log in own.items()]
    return geometric_mean_of(logs, **_about(study, (arm, over) if over else (arm,)))


def _by_seed(
    study: str, arms: tuple[str, str], key: str, quantity: Callable[[Factors, Factors, str], float]
) -> dict[str, float]:
    """Returns a quantity of two arms' adapters by seed, from the file if that has it.

    Raises:
        NotRunError: The adapters of a run are not in the store.
    """
    results, path = StudyResults(study), directions_path(study)
    key = f"{' and '.join(dict.fromkeys(arms))}: {key}"
    stored: dict[str, dict[str, float]] = {}
    for file in (published(f"{study}/{path.name}"), path):
        stored |= json.loads(file.read_text()) if file.is_file() else {}
    if key not in stored:
        runs = [results.arm_runs(arm).set_index("seed")["run_id"] for arm in arms]
        model = str(results.table["model"].iloc[0])
        stored[key] = {
            str(seed): quantity(_factors(runs[0][seed]), _factors(runs[1][seed]), model)
            for seed in runs[0].index.intersection(runs[1].index)
        }
        write_json(path, stored)
    return stored[key]


def _factors(run: str) -> Factors:
    folder = run_folder(run) / "adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        raise NotRunError(f"the adapter of {run} is not in the store; train it again")
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    found, scale = {}, config["lora_alpha"] / config["r"]
    for name, a in tensors.items():
        if ".lora_A." in name:
            matrix = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[matrix] = a, tensors[name.replace(".lora_A.", ".lora_B.")], scale
    return found


def _named(factors: Factors, modules: list[str]) -> list[str]:
    return [name for name in factors if name.rsplit(".", 1)[-1] in modules]


def _directions(a: torch.Tensor, b: torch.Tensor, scale: float, of: str) -> torch.Tensor:
    """Returns the right singular vectors, one a row, in the order of their singular values."""
    if of == "A":
        return torch.linalg.svd(a, full_matrices=False).Vh
    q, r = torch.linalg.qr(a.T)
    return torch.linalg.svd(scale * b @ r.T, full_matrices=False).Vh @ q.T


def _about(study: str, arms: tuple[str, ...]) -> dict[str, Any]:
    results = StudyResults(study)
    return {"model": results.subject, "run_ids": runs_of(results, *dict.fromkeys(arms))}
