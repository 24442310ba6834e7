"""Asks the memory estimators of others about published points, each in an environment of its own with pinned versions.

They know a model by its hub id and read its ``config.json`` from a local cache that is made here, without a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.points import Point, once
from peftscope.hardware.cards import find_gpu
from peftscope.models.presets import PRESETS
from peftscope.words import GIB, MIB

ENVIRONMENTS = Path(".venv-scorecard")
"""The environments. git ignores them."""
OTHERS = Path("benchmarks/others")
"""Their requirements, and the scripts that ask those without a command that works offline."""

FUSED = ("sdpa", "flash_attention_2")
"""Attention that never holds all scores: what others call flash attention."""
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL_LINEAR = ATTENTION | {"gate_proj", "up_proj", "down_proj"}

TOLD = ("method", "rank", "targets", "batch_size", "seq_len", "checkpointing", "optimizer", "attention")
"""The settings of a run that others are told."""

Answers = dict[str, int | str]
"""Bytes by point, or the reason why there is no answer."""


@dataclass(frozen=True)
class Estimator:
    """An estimator of others.

    Attributes:
        name: Its name on the package index.
        asks: Returns the answers to points, by the environment's Python and a folder with the models' configurations.
        models_activations: Whether it models what a step keeps for the backward pass.
        total: The number that is compared, in words.
    """

    name: str
    asks: Callable[[Path, Path, list[Point]], Answers]
    models_activations: bool
    total: str

    @property
    def requirements(self) -> str:
        """The pinned versions of its environment."""
        return (OTHERS / f"{self.name}.txt").read_text()

    @property
    def version(self) -> str:
        """Its own version."""
        pins = dict(line.split("==") for line in self.requirements.splitlines())
        return pins[self.name]


def targets_of(point: Point) -> set[str]:
    """Returns the adapted modules of a point's run."""
    return set(point.asked.get("targets", ()))


def ask_fitcheck(python: Path, cache: Path, points: list[Point]) -> Answers:
    """Returns fitcheck's total: tensors, and its overhead for the CUDA context and the allocator."""

    def words(point: Point) -> list[str]:
        asked, method = point.asked, point.asked["method"]
        said = [point.hub_id, "--json", "--precision", "bf16", "--batch-size", str(asked["batch_size"])]
        said += ["--seq-len", str(asked["seq_len"]), "--vram-mib", str(find_gpu(point.gpu).memory_bytes // MIB)]
        said += ["--optimizer", "adam8bit" if "8bit" in asked.get("optimizer", "") else "adamw"]
        said += ["--quant", "nf4", "--double-quant"] if method == "qlora" else []
        adapter = ["--lora-r", str(asked.get("rank")), "--lora-targets", ",".join(sorted(targets_of(point)))]
        said += ["--no-lora"] if method == "full" else adapter
        said += ["--grad-checkpoint"] if asked.get("checkpointing") else []
        return said + (["--flash-attn"] if asked.get("attention", "sdpa") in FUSED else [])

    def size(content: Any) -> int:
        return round(content["memory_mib"]["total"] * MIB)

    return {point.id: _by_command([python, "-m", "fitcheck", *words(point)], cache, size) for point in points}


def ask_canifinetune(python: Path, cache: Path, points: list[Point]) -> Answers:
    """Returns canifinetune's estimate of what the process reserves: its total without its safety margin."""
    run = "import sys; from canifinetune.cli import app; sys.argv[0] = 'canifinetune'; app()"

    def words(point: Point) -> list[str]:
        asked, method = point.asked, point.asked["method"]
        said = ["estimate", "--json", "--model", point.hub_id, "--method", method, "--base-dtype", "bf16"]
        said += ["--gpu-vram-gb", str(find_gpu(point.gpu).memory_bytes / GIB), "--seq-len", str(asked["seq_len"])]
        said += ["--micro-batch-size", str(asked["batch_size"]), "--attn", asked.get("attention", "sdpa")]
        said += ["--quantization", "nf4_double_quant" if method == "qlora" else "none"]
        said += [
            "--optimizer",
            {"adamw": "adamw_torch"}.get(asked.get("optimizer", "adamw"), asked.get("optimizer", "")),
        ]
        said += [f"--{'' if asked.get('checkpointing') else 'no-'}gradient-checkpointing"]
        if method != "full":
            said += ["--lora-rank", str(asked["rank"]), "--target-scope", scopes[frozenset(targets_of(point))]]
        return said

    scopes = {frozenset(ATTENTION): "attention", frozenset(ALL_LINEAR): "all_linear"}
    scopes[frozenset({"q_proj", "v_proj"})] = "conservative"

    def size(content: Any) -> int:
        memory = content["memory"]
        return round((memory["total_estimated_gb"] - memory["safety_margin_gb"]) * GIB)

    answers: Answers = {}
    for point in points:
        if point.asked["method"] != "full" and frozenset(targets_of(point)) not in scopes:
            answers[point.id] = "it has no such targets"
        else:
            answers[point.id] = _by_command([python, "-W", "ignore", "-c", run, *words(point)], cache, size)
    return answers


def ask_ftuneai(python: Path, cache: Path, points: list[Point]) -> Answers:
    """Returns ftuneai's total, a fifth of which it adds for the CUDA context and the allocator."""
    scopes = {frozenset(ATTENTION): "attention_all", frozenset(ALL_LINEAR): "all_linear"}
    scopes[frozenset({"q_proj", "v_proj"})] = "attention"
    questions, answers = {}, Answers()
    for point in points:
        asked, method = point.asked, point.asked["method"]
        targets = frozenset(targets_of(point))
        if method != "full" and targets not in scopes:
            answers[point.id] = "it has no such targets"
            continue
        questions[point.id] = {
            "model": point.hub_id,
            "method": method,
            "quantization": "4bit" if method == "qlora" else "none",
            "batch_size": asked["batch_size"],
            "seq_length": asked["seq_len"],
            "gradient_checkpointing": bool(asked.get("checkpointing")),
            "optimizer": "adam_8bit" if "8bit" in asked.get("optimizer", "") else "adamw",
            "lora_rank": asked.get("rank", 16),
            "lora_target": scopes.get(targets, "attention"),
            "flash_attention": asked.get("attention", "sdpa") in FUSED,
        }
    configs = {point.hub_id: config_of(point) for point in points}
    return answers | _by_script(python, "ask_ftuneai.py", {"questions": questions, "configs": configs})


def ask_accelerate(python: Path, cache: Path, points: list[Point]) -> Answers:
    """Returns accelerate's estimate of training with Adam or, since it knows no adapters, of the weights under one."""
    questions = {
        point.id: {
            "config": config_of(point),
            "dtype": "int4" if point.asked["method"] == "qlora" else "float16",
            "trains_base": point.asked["method"] == "full",
        }
        for point in points
    }
    return _by_script(python, "ask_accelerate.py", questions)


ESTIMATORS = (
    Estimator("canifinetune", ask_canifinetune, True, "what the process reserves, without the safety margin"),
    Estimator("fitcheck-llm", ask_fitcheck, True, "the total, with overhead for the CUDA context and the allocator"),
    Estimator("ftuneai", ask_ftuneai, True, "the total, a fifth on top for the CUDA context and the allocator"),
    Estimator("accelerate", ask_accelerate, False, "training with Adam, or the weights under an adapter"),
)


def config_of(point: Point) -> dict[str, Any]:
    """Returns the content of the ``config.json`` of a point's model."""
    return PRESETS[point.preset].shape.to_config()


def answers_of(estimator: Estimator, points: list[Point]) -> Answers:
    """Returns an estimator's answers, from the cache if it was asked the same before.

    Raises:
        subprocess.CalledProcessError: Its environment cannot be installed.
    """
    told = [{name: point.asked[name] for name in TOLD if name in point.asked} for point in points]
    asked = [(point.id, point.hub_id, point.gpu, run) for point, run in zip(points, told, strict=True)]
    scripts = [Path(__file__), *sorted(OTHERS.glob("*.py"))]
    key = [estimator.requirements, asked, [path.read_text() for path in scripts]]

    def compute() -> Answers:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            for point in points:
                _write_config(cache, point.hub_id, config_of(point))
            return estimator.asks(install(estimator), cache, points)

    return once(estimator.name, key, compute)


def install(estimator: Estimator) -> Path:
    """Returns the Python of an estimator's environment, which is created if its requirements changed.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    folder = (ENVIRONMENTS / estimator.name).absolute()
    ready, python = folder / "requirements.txt", folder / "bin" / "python"
    if not ready.is_file() or ready.read_text() != estimator.requirements:
        venv.create(folder, with_pip=True, clear=True)
        packages = str(OTHERS / f"{estimator.name}.txt")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", packages], check=True)
        ready.write_text(estimator.requirements)
    return python


def _write_config(cache: Path, hub_id: str, config: Mapping[str, Any]) -> None:
    """Writes a configuration where huggingface_hub looks for a model that it has fetched."""
    model = cache / "hub" / f"models--{hub_id.replace('/', '--')}"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / "main").write_text("0")
    (model / "snapshots" / "0").mkdir(parents=True, exist_ok=True)
    (model / "snapshots" / "0" / "config.json").write_text(json.dumps(config))


def _by_command(words: list[Any], cache: Path, size: Callable[[Any], int]) -> int | str:
    """Returns what a command with JSON on its output says, or the last line of its complaint."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    try:
        return size(json.loads(done.stdout))
    except (ValueError, KeyError):
        lines = (done.stderr or done.stdout).strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"


def _by_script(python: Path, name: str, content: Any) -> Answers:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [python, "-W", "ignore", str(OTHERS / name)]
    done = subprocess.run(
        words,
        input=json.dumps(content),
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
