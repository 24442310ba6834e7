"""A method of a file: found, run, measured and reported without a change to any file of this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import python

from peftscope.layout import record_path
from peftscope.models.catalog import find_model

VERA = '''
"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): random matrices that all layers share, scaled by trained vectors."""

from typing import Any, ClassVar

from peftscope.methods.fields import Dropout, Method, Rank, Targets, target_modules


class VeRA(Method):
    label: ClassVar[str] = "VeRA"
    run_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 0.01}

    rank: Rank = 8
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0

    def trainable_parameters(self, shape):
        return sum(self.rank + layer.outputs for layer in shape.linear_layers(self.targets_of()))

    def build(self, model, spec):
        from peft import VeraConfig, get_peft_model

        config = VeraConfig(
            task_type="CAUSAL_LM", r=self.rank, target_modules=self.targets_of(), vera_dropout=self.dropout
        )
        return get_peft_model(model, config)

'''


@pytest.fixture
def vera(own: Callable[[str, str], Path]) -> Callable[[str, str], Path]:
    """A folder with the method, as the current one; writes experiment files into it."""
    Path("experiments/methods").mkdir()
    Path("experiments/methods/vera.py").write_text(VERA)
    return own


ONE_RUN = """
fixed: {model: toy, steps: 6, batch_size: 8, heldout_items: 16, generation_items: 4, eval_batch_size: 8,
  retention_tokens: 64, untimed_steps: 1}
axes: {method: [vera], rank: [4]}
"""


def test_an_experiment_knows_it_and_says_that_its_memory_is_not_known(vera) -> None:
    vera("mine", ONE_RUN)
    done = python("-m", "peftscope", "expand", "mine", "--gpu", "24GiB")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("vera-r4-all-linear-s0")]
    assert " VeRA " in line and " 0.01 " in line
    assert "not known: vera has no closed form" in line
    assert "of GPU to go, peak not known of 1 (`peftscope memory` simulates it)." in done.stdout
    code = "from peftscope.methods import METHODS; import sys; print(list(METHODS)[-2:], 'torch' in sys.modules)"
    assert python("-c", code).stdout == "['peft', 'vera'] False\n"
    code_of_demands = "from peftscope.planning.demands import host_bytes; from peftscope.planning.sweep import expand; "
    code_of_demands += "print(*map(host_bytes, expand('both').runs.values()))"
    vera("both", ONE_RUN.replace("[vera]", "[vera, lora]"))
    own, lora = map(int, python("-c", code_of_demands).stdout.split())
    assert own >= lora > 2**31  # what every process takes, and tensors


@pytest.mark.slow
def test_it_runs_and_is_reported_and_its_memory_is_simulated(vera, repository: Path) -> None:
    vera("mine", ONE_RUN)
    for name in ("Snakefile", "profiles", "src"):
        Path(name).symlink_to(repository / name)
    done = python("-m", "snakemake", "-n", "--cores", "1", "--config", "experiment=mine")
    assert done.returncode == 0, done.stdout + done.stderr

    code = "import json; from peftscope.planning.sweep import expand; "
    code += "print(json.dumps({i: s.canonical() for i, s in expand('mine').runs.items()}))"
    ((run, spec),) = json.loads(python("-c", code).stdout).items()
    assert run.startswith("vera-r4-all-linear-s0-")
    done = python("-m", "peftscope", "run", json.dumps(spec), "--threads", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(record_path(run).read_text())
    assert (record["status"], record["reason"]) == ("ok", None)
    digest = record["provenance"]["packages"]["experiments/methods/vera.py"]
    fields = {"name": "vera", "file_sha256": digest, "rank": 4, "targets": "all-linear", "dropout": 0.0}
    assert record["spec"]["method"] == fields
    memory = record["memory"]
    assert memory["predicted"]["backward_peak_tensor_bytes"] == memory["backward_peak_tensor_bytes"] > 0

    done = python("-m", "peftscope", "report", "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = pd.read_csv("results/mine/runs.csv").to_dict("records")
    assert (row["label"], row["method"], row["status"]) == ("VeRA", "vera", "ok")
    assert "VeRA" in Path("reports/mine/report.html").read_text()


@pytest.mark.slow
def test_questions_about_its_memory_are_simulated_and_say_so(vera) -> None:
    ask = ["-m", "peftscope", "memory", "toy", "--method", "vera", "--seq-len", "64", "--rank", "4"]
    found = json.loads(python(*ask, "--simulate", "--json").stdout)
    assert found["how"] == "simulation"
    assert "vera has no closed form: its peaks are simulated" in found["assumptions"]
    shape = find_model("toy").shape
    widest = [max(getattr(layer, side) for layer in shape.block) for side in ("inputs", "outputs")]
    assert found["components"]["weights"] >= 2 * found["parameters"] + 4 * 4 * sum(widest)  # both matrices, in 32 bits
    assert "simulated on tensors without data, because vera has no closed form" in python(*ask).stdout
    done = python(*ask, "--gpus", "2")
    assert done.returncode == 2
    assert "only the closed form can answer for several cards, and vera has none" in done.stderr
    fit = ["-m", "peftscope", "fit", "toy", "--gpu", "4GiB", "--methods", "lora,vera", "--seq-len", "64"]
    lora, own = json.loads(python(*fit, "--rank", "4", "--json").stdout)
    assert (lora["how"], own["how"]) == ("formula", "simulation")
    assert own["fits"] and own["largest_batch_size"] is None
    assert own["phases"].keys() == lora["phases"].keys()
    assert own["phases"]["backward"] == found["phases"]["backward"]
