"""A method of another package: found, run, measured and reported without a change to any file of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import conftest
import pandas as pd
import pytest

from peftscope import methods
from peftscope.errors import InputError
from peftscope.layout import record_path
from peftscope.models.catalog import find_model

VERA = '''
"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): random matrices that all layers share, scaled by trained vectors."""

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import Dropout, Method, Rank, Targets, target_modules


class VeRA(Method):
    label: ClassVar[str] = "VeRA"
    run_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 0.01}

    name: Literal["vera"] = "vera"
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


def no_class():
    pass


class Anonymous(Method):
    label: ClassVar[str] = "?"


class Unlabelled(Method):
    name: Literal["vera"] = "vera"
'''

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Puts distributions into a folder as an installer leaves them: a module, and metadata with entry points."""
    site = tmp_path / "site-packages"

    def write(distribution: str, **points: str) -> Path:
        metadata = site / f"{distribution.replace('-', '_')}-0.1.dist-info"
        metadata.mkdir(parents=True)
        (site / "vera_method.py").write_text(VERA)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\n")
        lines = "".join(f"{name.replace('_', '-')} = {value}\n" for name, value in points.items())
        (metadata / "entry_points.txt").write_text(f"[peftscope.methods]\n{lines}")
        return site

    return write


@pytest.fixture
def python(tmp_path: Path) -> Command:
    """Runs a Python that has the distributions."""
    path = os.pathsep.join([str(tmp_path / "site-packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return partial(conftest.python, env=os.environ | {"PYTHONPATH": path})


ONE_RUN = """
fixed: {model: toy, steps: 6, batch_size: 8, heldout_items: 16, generation_items: 4, eval_batch_size: 8,
  retention_tokens: 64, untimed_steps: 1}
axes: {method: [vera], rank: [4]}
"""


def test_an_experiment_knows_it_and_says_that_its_memory_is_not_known(install, python: Command, own) -> None:
    install("peftscope-vera", vera="vera_method:VeRA")
    own("mine", ONE_RUN)
    done = python("-m", "peftscope", "expand", "mine", "--gpu", "24GiB")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("vera-r4-all-linear-s0")]
    assert " VeRA " in line and " 0.01 " in line
    assert "not known: vera has no closed form" in line
    assert "of GPU to go, peak not known of 1 (`peftscope memory` simulates it)." in done.stdout
    code = "from peftscope.methods import METHODS; import vera_method, sys; "
    code += "print(list(METHODS)[-2:], METHODS['vera'] is vera_method.VeRA, 'torch' in sys.modules)"
    assert python("-c", code).stdout == "['peft', 'vera'] True False\n"
    code_of_demands = "from peftscope.planning.demands import host_bytes; from peftscope.planning.sweep import expand; "
    code_of_demands += "print(*map(host_bytes, expand('both').runs.values()))"
    own("both", ONE_RUN.replace("[vera]", "[vera, lora]"))
    vera, lora = map(int, python("-c", code_of_demands).stdout.split())
    assert vera >= lora > 2**31  # what every process takes, and tensors
    # Its module can come first: it imports this package, which must not look for it while it is half imported.
    assert python("-c", f"import vera_method; {code}").stdout == "['peft', 'vera'] True False\n"


WRONG = {
    "a name of ours": ({"lora": "vera_method:VeRA"}, "the name 'lora' belongs to a method of peftscope"),
    "no class": (
        {"vera": "vera_method:no_class"},
        "is not a subclass of peftscope.methods.fields.Method (got <function",
    ),
    "no name": ({"vera": "vera_method:Anonymous"}, 'needs the field `name: Literal["vera"] = "vera"`'),
    "another name": ({"very": "vera_method:VeRA"}, 'needs the field `name: Literal["very"] = "very"`'),
    "no label": ({"vera": "vera_method:Unlabelled"}, "needs a `label`"),
    "no module": ({"vera": "nothing_here:VeRA"}, "cannot be loaded: ModuleNotFoundError"),
    "nothing in it": ({"vera": "vera_method:Nothing"}, "cannot be loaded: AttributeError"),
}


@pytest.fixture
def refused(install, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Looks for methods among the distributions that are installed then, and returns what is said of them."""

    def look() -> str:
        monkeypatch.syspath_prepend(install("peftscope-none").as_posix())
        monkeypatch.delitem(sys.modules, "vera_method", raising=False)
        with pytest.raises(InputError) as caught:
            methods._outside.__wrapped__()
        (line,) = str(caught.value).splitlines()
        return line

    return look


@pytest.mark.parametrize(("points", "wrong"), WRONG.values(), ids=WRONG)
def test_one_that_cannot_be_used_is_named_with_its_distribution(
    points: dict[str, str], wrong: str, install, refused: Callable[[], str]
) -> None:
    install("peftscope-vera", **points)
    line = refused()
    assert line.startswith(f"entry point {next(iter(points))} = ")
    assert "of peftscope-vera 0.1: " in line and wrong in line


def test_two_of_one_name_are_refused_whichever_comes_first(install, refused: Callable[[], str]) -> None:
    for distribution in ("vera-two", "vera-one"):
        install(distribution, vera="vera_method:VeRA")
    wanted = "vera_method:VeRA of vera-two 0.1: the name 'vera' belongs to a method of vera-one 0.1"
    assert wanted in refused()


@pytest.mark.slow
def test_it_runs_and_is_reported_and_its_memory_is_simulated(install, python: Command, own, repository: Path) -> None:
    install("peftscope-vera", vera="vera_method:VeRA")
    own("mine", ONE_RUN)
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
    assert record["spec"]["method"] == {"name": "vera", "rank": 4, "targets": "all-linear", "dropout": 0.0}
    assert record["provenance"]["packages"]["peftscope-vera"] == "0.1"
    memory = record["memory"]
    assert memory["predicted"]["backward_peak_tensor_bytes"] == memory["backward_peak_tensor_bytes"] > 0

    done = python("-m", "peftscope", "report", "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = pd.read_csv("results/mine/runs.csv").to_dict("records")
    assert (row["label"], row["method"], row["status"]) == ("VeRA", "vera", "ok")
    assert "VeRA" in Path("reports/mine/report.html").read_text()


@pytest.mark.slow
def test_questions_about_its_memory_are_simulated_and_say_so(install, python: Command) -> None:
    install("peftscope-vera", vera="vera_method:VeRA")
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
    lora, vera = json.loads(python(*fit, "--rank", "4", "--json").stdout)
    assert (lora["how"], vera["how"]) == ("formula", "simulation")
    assert vera["fits"] and vera["largest_batch_size"] is None
    assert vera["phases"].keys() == lora["phases"].keys()
    assert vera["phases"]["backward"] == found["phases"]["backward"]
