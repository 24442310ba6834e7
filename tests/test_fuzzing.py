"""Whatever people write: it loads, or it is refused with a place and a reason, and never hangs.

The same cases every time. ``PEFTSCOPE_FUZZ=100`` tries a hundred times as many, other ones each time.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peftscope.claims.ledger import read_ledger
from peftscope.content import LARGEST_BYTES, parse_json, read_yaml
from peftscope.data import scoring, tasks
from peftscope.data.batching import IGNORED, collate, pack, tokenise
from peftscope.data.tasks import SPLITS, Item, find_task, make_task, read_split
from peftscope.errors import InputError
from peftscope.memory.answer import answer_by_formula
from peftscope.memory.hardware import find_gpu
from peftscope.memory.presets import PRESETS
from peftscope.memory.question import METHOD_OPTIONS, ask
from peftscope.memory.question import find_model as find_described
from peftscope.methods import METHODS
from peftscope.methods.fields import TARGET_PRESETS
from peftscope.models import catalog
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.load import load_tokenizer
from peftscope.plan import plan_experiment
from peftscope.record import RunRecord, read_record, write_record
from peftscope.spec import RUN_ID_PATTERN, RunSpec, run_id
from peftscope.sweep import LARGEST_SWEEP, expand, spec_from
from peftscope.training.run import _write_items

MORE = int(os.environ.get("PEFTSCOPE_FUZZ", "1"))
LONGEST_SECONDS = 30
"""Of one case on a busy machine; most take milliseconds."""


def cases(count: int) -> settings:
    """How often a test runs: fixed cases, so that a failure here is a failure there."""
    return settings(
        max_examples=count * MORE,
        deadline=None,
        derandomize=MORE == 1,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def loads_or_refuses(load: Callable[[], Any]) -> Any:
    """Returns what loads, or the InputError; any other exception is the test's failure."""
    began = time.monotonic()
    try:
        return load()
    except InputError as error:
        message = str(error)
        message.encode()
        assert all(problem.where and problem.message for problem in error.problems)
        assert all(c.isprintable() or c == "\n" for c in message)
        assert len(message) < 4000 * len(error.problems)
        return error
    finally:
        assert time.monotonic() - began < LONGEST_SECONDS


@pytest.fixture
def own(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with copies of the experiment files, as the current one."""
    shutil.copytree(repository / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget_files()


def forget_files() -> None:
    for cached in (tasks._tasks, tasks._scoring, catalog._catalog):
        cached.cache_clear()


# Valid by construction.


def values_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Any value that a field of a spec may have."""
    bounds = {type(rule): rule for rule in metadata}
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if type(None) in get_args(annotation):
        (inner,) = [part for part in get_args(annotation) if part is not type(None)]
        return st.none() | values_of(inner, metadata)
    if hasattr(annotation, "__metadata__"):
        return values_of(annotation.__origin__, [*metadata, *(m for f in annotation.__metadata__ for m in f.metadata)])
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        lowest, highest = bounds[Ge].ge, bounds[Le].le
        return st.integers(lowest, min(highest, 20)) | st.integers(lowest, highest)
    if annotation is float:
        return st.floats(
            bounds[Ge].ge if Ge in bounds else bounds[Gt].gt,
            bounds[Lt].lt if Lt in bounds else None,
            exclude_min=Gt in bounds,
            exclude_max=Lt in bounds,
            allow_nan=False,
            allow_infinity=False,
        )
    raise AssertionError(f"no strategy for {annotation}")


REVISIONS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,20}", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)
MODULES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=4)
OWN_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": NAMES | st.builds("{}/{}".format, NAMES, NAMES),
    "task": NAMES,
    "revision": st.none() | REVISIONS,
    "targets": st.sampled_from(sorted(TARGET_PRESETS)) | MODULES,
}


def fields_of(cls: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {
        name: OWN_VALUES[name] if name in OWN_VALUES else values_of(field.annotation, field.metadata)
        for name, field in cls.model_fields.items()
        if name != "method"
    }


@st.composite
def specs(draw: st.DrawFn, names: tuple[str, ...] = tuple(METHODS)) -> RunSpec:
    """Any spec of any method: a value for some fields, and then what the rules over several fields ask for."""
    cls = METHODS[draw(st.sampled_from(names))]
    method = {n: draw(s) for n, s in fields_of(cls).items() if n == "name" or draw(st.booleans())}
    must = ("model", "task", "learning_rate")
    top = {n: draw(s) for n, s in fields_of(RunSpec).items() if n in must or draw(st.booleans())}
    if cls.__name__ == "AdaLoRA":
        method["init_r"] = max(method.get("init_r", 12), 2)
        method["target_r"] = min(method.get("target_r", 8), method["init_r"] - 1)
        method.pop("warmup_share", None)
    try:
        built = cls(**method)
    except ValidationError:  # AdaLoRA's shares
        assume(False)
    if built.quantization():
        top["precision"] = "bf16"
    top["steps"] = max(top.get("steps", 16), built.min_steps)
    top["heldout_items"] = max(top.get("heldout_items", 256), top.get("generation_items", 64))
    if not built.supports_packing:
        top["packing"] = False
    if not built.supports_checkpointing:
        top["checkpointing"] = False
    if top.get("attention") == "flash_attention_2":
        top |= {"device": "cuda", "packing": False}
        top["precision"] = "amp" if top.get("precision") == "fp32" else top.get("precision", "bf16")
    if top.get("optimizer", "adamw") not in ("adamw", "sgd"):
        top.pop("optimizer_implementation", None)
    return RunSpec(method=built, **top)


def check_round_trip(spec: RunSpec) -> None:
    text = json.dumps(spec.canonical(), sort_keys=True)
    again = spec_from(parse_json(text, "spec"), Path("spec"), "cpu")
    assert again == spec
    assert run_id(again) == run_id(spec)
    assert re.fullmatch(RUN_ID_PATTERN, run_id(spec))
    whole = spec_from(parse_json(json.dumps(spec.model_dump(mode="json")), "spec"), Path("spec"), "cpu")
    assert (whole, run_id(whole)) == (spec, run_id(spec))


@pytest.mark.parametrize("method", METHODS)
def test_a_few_specs_of_every_method_come_back_from_json(method: str) -> None:
    @cases(8)
    @given(specs((method,)))
    def check(spec: RunSpec) -> None:
        check_round_trip(spec)

    check()


@pytest.mark.slow
@cases(600)
@given(specs())
def test_specs_come_back_from_json(spec: RunSpec) -> None:
    check_round_trip(spec)


@cases(40)
@given(spec=specs(), reason=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_specs_come_back_from_records(spec: RunSpec, reason: str, own: Path) -> None:
    write_record(own / "record.json", RunRecord(run_id=run_id(spec), status="failed", reason=reason, spec=spec))
    again = read_record(own / "record.json")
    assert (again.spec, again.reason, again.run_id) == (spec, reason, run_id(again.spec))


AXES: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.integers(1, 64),
    "alpha": st.floats(0.5, 64),
    "targets": st.sampled_from(sorted(TARGET_PRESETS)) | st.lists(st.sampled_from(["q_proj", "k_proj"]), min_size=1),
    "dropout": st.floats(0, 0.5),
    "steps": st.integers(10, 2**31 - 1),
    "batch_size": st.integers(1, 2**31 - 1),
    "learning_rate": st.floats(0, 1e3),
    "schedule": st.sampled_from(["constant", "linear", "cosine"]),
    "seed": st.integers(0, 2**31 - 1),
    "adam_epsilon": st.floats(0, 1, exclude_min=True),
}
AN_AXIS = st.sampled_from(sorted(AXES)).flatmap(
    lambda name: st.tuples(st.just(name), st.lists(AXES[name], min_size=1, max_size=3))
)
EXPERIMENTS = st.fixed_dictionaries(
    {"fixed": st.just({"model": "toy"}), "axes": st.lists(AN_AXIS, min_size=1, max_size=3).map(dict)},
    optional={
        "title": st.text(max_size=20),
        "description": st.text(max_size=60),
        "seeds": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
        "ladders": st.lists(
            st.builds(lambda axis: {"centre": {"method": "lora"}, "axes": dict([axis])}, AN_AXIS), max_size=2
        ),
    },
)


def check_expansion(experiment: dict[str, Any], own: Path) -> None:
    text = yaml.safe_dump(experiment)
    (own / "experiments/mine.yaml").write_text(text)
    sweep = expand("mine")
    assert read_yaml(own / "experiments/mine.yaml") == experiment
    assert sweep.runs
    for identity, spec in sweep.runs.items():
        assert re.fullmatch(RUN_ID_PATTERN, identity)
        assert run_id(spec) == identity
    assert len(set(sweep.runs.values())) == len(sweep.runs) <= LARGEST_SWEEP


@cases(30)
@given(experiment=EXPERIMENTS)
def test_a_few_experiments_expand_into_unique_runs(experiment: dict[str, Any], own: Path) -> None:
    check_expansion(experiment, own)


@pytest.mark.slow
@cases(300)
@given(experiment=EXPERIMENTS)
def test_experiments_expand_into_unique_runs(experiment: dict[str, Any], own: Path) -> None:
    check_expansion(experiment, own)


# Broken files.

TEXT = st.text(st.characters(), max_size=20)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([1e308, -0.0, 5e-324, float("nan"), float("inf")]),
    TEXT,
    st.sampled_from(
        ["", " ", "\x00", "\x1b[2J", "\u2028", "../../x", "/etc/passwd", "-x", "a" * 300, "$(touch x)", "'"]
    ),
    st.sampled_from(["\ud800", "\U0001f600", "é", "\u202e", "toy", "lora", "none", "quick", "mine", "defaults"]),
    st.dates(date(1, 1, 1), date(9999, 12, 31)),
    st.binary(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree but its root."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        yield (*here, key)
        yield from places(part, (*here, key))


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of which one to three nodes were replaced, removed, inserted, repeated or put elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = tree
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "insert", "move", "rename"]))
        if action == "replace":
            parent[last] = draw(VALUES)
        elif action == "remove":
            del parent[last]
        elif action == "insert" and isinstance(parent, list):
            parent.insert(last, draw(VALUES))
        elif action == "insert":
            parent[draw(TEXT)] = draw(VALUES)
        elif action == "rename" and isinstance(parent, dict):
            parent[draw(TEXT | st.sampled_from(["name", "method", "seed", "<<", "with", "model", "__class__"]))] = (
                parent.pop(last)
            )
        else:
            other = tree
            for key in draw(st.sampled_from(found))[:-1]:
                other = other[key] if isinstance(other, dict) and key in other else other
            parent[last] = copy.deepcopy(other)
    return tree


SPLICES = st.sampled_from(
    [
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system ['false']",
        "!!python/name:os.system",
        "!function os.system",
        "!!binary aGVsbG8=",
        "!!binary x",
        "!!timestamp x",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!int ''",
        "!!int abc",
        "!!float abc",
        "!!bool maybe",
        "!!map x",
        "!!str [a]",
        "2024-13-45",
        "2024-01-01",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1" + ":1" * 2000,
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        "\x00",
        "\x1b",
        "\ufeff",
        "\u2028",
        "\t",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "[" * 400,
        "{a: " * 400,
        "- " * 400,
        "? ",
        ": ",
        "yes: 1",
        "[a]: 1",
        ".nan",
        "-.inf",
        "1e999",
        "| \n",
        "#",
    ]
)


@st.composite
def spliced(draw: st.DrawFn, text: str) -> bytes:
    """A file's text with pieces cut out, put in and repeated, or with bytes that are noise."""
    content = text
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 30)))
        piece = draw(SPLICES | TEXT | st.just(content[start:end] * 2))
        content = content[:start] + piece + content[end:]
    encoded = content.encode(errors="surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(encoded)))
        encoded = encoded[:at] + draw(st.binary(min_size=1, max_size=3)) + encoded[at + 1 :]
    return encoded


def dumped(tree: Any) -> bytes:
    """A tree as YAML, with halves of surrogate pairs as escapes, dates as dates and bytes as ``!!binary``."""
    return yaml.dump(tree, Dumper=yaml.SafeDumper).encode(errors="surrogatepass")


FOLDER = Path(__file__).parent.parent / "experiments"


def tree_of(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def some_claims() -> dict[str, Any]:
    """One claim for every kind of part: the whole ledger takes seconds to parse."""
    chosen, kinds = [], set()
    for claim in tree_of("claims.yaml")["claims"]:
        new = {(part["kind"], *sorted(part.get("rule", {}))) for part in claim["parts"]} - kinds
        if new or "study" in str(claim):
            kinds |= new
            chosen.append(claim)
    return {"claims": chosen[:12]}


def load_models() -> None:
    for name in catalog._catalog():
        find_model(name)
        assert model_folder(name).parent == catalog.MODELS_FOLDER
        assert ".." not in model_folder(name).parts


def load_tasks() -> None:
    for name in tasks._tasks():
        find_task(name)
        assert tasks.task_folder(name).parent == tasks.TASKS_FOLDER


KINDS: dict[str, tuple[str, Any, Callable[[], Any]]] = {
    "smoke": ("mine.yaml", tree_of("smoke.yaml"), lambda: plan_experiment("mine")),
    "quick": ("mine.yaml", tree_of("quick.yaml"), lambda: plan_experiment("mine")),
    "kin": ("mine.yaml", tree_of("kin.yaml") | {"extends": "smoke"}, lambda: plan_experiment("mine")),
    "study": ("mine.yaml", tree_of("variants.yaml"), lambda: plan_experiment("mine")),
    "defaults": ("defaults.yaml", tree_of("defaults.yaml"), lambda: plan_experiment("smoke")),
    "models": ("models.yaml", tree_of("models.yaml"), load_models),
    "tasks": ("tasks.yaml", tree_of("tasks.yaml"), load_tasks),
    "claims": ("claims.yaml", some_claims(), read_ledger),
    "scoring": (
        "tasks/two-digit-sums.yaml",
        tree_of("tasks/two-digit-sums.yaml"),
        lambda: scoring.read_scoring("two-digit-sums"),
    ),
    "run": (
        "run.yaml",
        {"model": "toy", "method": "adalora", "init_r": 4, "target_r": 2, "targets": ["q_proj"], "steps": 9, "seed": 3},
        lambda: spec_from(read_yaml(Path("experiments/run.yaml")), Path("run.yaml"), "cpu"),
    ),
}


def check_file(kind: str, content: bytes, own: Path) -> None:
    name, _, load = KINDS[kind]
    path = own / "experiments" / name
    before = path.read_bytes() if path.is_file() else None
    path.write_bytes(content)
    forget_files()
    try:
        loads_or_refuses(load)
    finally:
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_broken_files(kind: str, own: Path) -> None:
    tree = KINDS[kind][1]

    @cases(10)
    @given(mutated(tree).map(dumped) | spliced(dumped(tree).decode()))
    def check(content: bytes) -> None:
        check_file(kind, content, own)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_broken_trees(kind: str, own: Path) -> None:
    @cases(100)
    @given(mutated(KINDS[kind][1]).map(dumped))
    def check(content: bytes) -> None:
        check_file(kind, content, own)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_broken_texts(kind: str, own: Path) -> None:
    name, tree, _ = KINDS[kind]
    # The files with their comments, where they are short enough.
    text = (FOLDER / name).read_text() if kind in ("models", "tasks", "defaults") else dumped(tree).decode()

    @cases(60)
    @given(spliced(text))
    def check(content: bytes) -> None:
        check_file(kind, content, own)

    check()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
WORST = {
    "a billion laughs": (LAUGHS, "more than 500,000 values"),
    "a list in itself": ("fixed: &a {b: *a}", "nested deeper"),
    "deep": ("fixed: " + "[" * 5000, "nested deeper"),
    "large": ("# " + "x" * LARGEST_BYTES, "more than the 1,000,000 allowed"),
    "a number of 5,000 digits": ("fixed: {steps: " + "9" * 5000 + "}", "more than 64 bits"),
    "a number of 20,000 bits": ("fixed: {steps: 0x" + "f" * 5000 + "}", "more than 64 bits"),
    "a seed beyond torch": ("fixed: {model: toy}\nseeds: [5000000000]", "less than or equal to 2147483647"),
    "a date that is none": ("fixed: {model: 2024-13-45}", "unknown model"),
    "a tag that does not fit": ("fixed: {steps: !!bool maybe}", "does not fit its tag"),
    "an object of Python": ("fixed: !!python/object/apply:os.system ['false']", "could not determine a constructor"),
    "half a surrogate pair": ('title: "\\ud800"', "half a surrogate pair"),
    "an escape beyond Unicode": ('title: "\\UFFFFFFFF"', "line 1: not valid YAML"),
    "a NUL": ("title: x\nfixed: \x00", "line 2: not valid YAML: the character U+0000"),
    "not UTF-8": (b"title: \xff", "cannot be read"),
    "two documents": ("title: x\n---\ntitle: y", "line 2"),
    "10^14 runs": (
        "axes: {" + ", ".join(f"{c}{i}: [1,2,3,4,5,6,7,8,9,10]" for i, c in enumerate("a" * 14)) + "}",
        "10",
    ),
    "2^3000 runs": ("axes: {" + ", ".join(f"a{i}: [1,2]" for i in range(3000)) + "}", "describes 10^903 runs"),
    "10^9 rungs": (
        "seeds: &n [" + ",".join(map(str, range(10_000))) + "]\nladders:\n"
        "- &l {axes: {rank: &r [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}\n" + "- *l\n" * 10_000,
        "describes 1,000,100,000 runs",
    ),
    "a name of 300 letters": ("fixed: {model: " + "a" * 300 + "}", "unknown model"),
    "a revision with a command": ("fixed: {model: a/b, revision: 'x;touch y'}", "should match pattern"),
}


@pytest.mark.parametrize(("text", "words"), WORST.values(), ids=WORST)
def test_the_worst_files(text: str | bytes, words: str, own: Path) -> None:
    (own / "experiments/mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    error = loads_or_refuses(lambda: plan_experiment("mine"))
    assert isinstance(error, InputError)
    assert "experiments/mine.yaml" in str(error)
    assert words in str(error)


def test_a_sweep_is_counted_before_it_is_made(own: Path) -> None:
    """The largest that is allowed has as many cells as it says."""
    values = ", ".join(map(str, range(1, 101)))
    text = (
        f"fixed: {{model: toy, method: lora}}\naxes: {{rank: [{values}]}}\nseeds: [{', '.join(map(str, range(1001)))}]"
    )
    (own / "experiments/mine.yaml").write_text(text)
    with pytest.raises(InputError, match=r"describes 100,100 runs, more than 100,000"):
        expand("mine")


NOT_FILES = {"a folder": "experiments", "a device": "/dev/zero", "a long name": "x" * 5000, "a NUL": "a\x00b"}


@pytest.mark.parametrize("name", NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_file(name: str, own: Path) -> None:
    assert isinstance(loads_or_refuses(lambda: read_yaml(Path(name))), InputError)


# JSON: specs on the command line, records, and descriptions of models.


def json_of(tree: Any) -> str:
    return json.dumps(tree, default=str)


OPTIONS = sorted({*RunSpec.model_fields, *METHOD_OPTIONS} - {"model", "task", "learning_rate", "device", "method"})
A_SPEC: dict[str, Any] = {"model": "toy", "task": "two-digit-sums", "learning_rate": 0.1, "seed": 1, "steps": 5}
A_WHOLE_SPEC = A_SPEC | {"method": {"name": "qlora", "rank": 4, "targets": ["q_proj"]}}
A_RECORD = {
    **RunRecord(
        run_id="x", status="ok", spec=RunSpec.model_validate(A_WHOLE_SPEC), train_nll=[1.0], method_metrics={"a": 1.0}
    ).model_dump(mode="json"),
}
A_CONFIG = PRESETS["llama-3.2-1b"][1].to_config()
JSONS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "spec": (
        A_SPEC | {"method": "lora", "rank": 2},
        lambda path: spec_from(parse_json(path.read_bytes().decode(errors="replace"), "spec"), Path("spec"), "cpu"),
    ),
    "whole spec": (
        A_WHOLE_SPEC,
        lambda path: spec_from(parse_json(path.read_bytes().decode(errors="replace"), "spec"), Path("spec"), "cpu"),
    ),
    "record": (A_RECORD, read_record),
    "config": (A_CONFIG, lambda path: answer(find_described(str(path)))),
}


def answer(model: Any) -> None:
    """The closed form, where it knows the family."""
    question = ask(model, {"method": "lora", "seq_len": 16})
    if model.shape is not None:
        answer_by_formula(question).to_json()


def check_json(kind: str, content: bytes, own: Path) -> None:
    path = own / "content.json"
    path.write_bytes(content)
    loads_or_refuses(lambda: JSONS[kind][1](path))


@pytest.mark.parametrize("kind", JSONS)
def test_a_few_broken_jsons(kind: str, own: Path) -> None:
    @cases(10)
    @given(mutated(JSONS[kind][0]).map(json_of).map(str.encode) | spliced(json_of(JSONS[kind][0])))
    @example(b"[" * 100_000)
    @example(b'{"a": ' * 5000)
    @example(b'{"method": "lora", "steps": ' + b"9" * 5000 + b"}")
    @example(b'{"method": "lora", "model": "\\ud800"}')
    @example(b'{"method": "lora", "\\ud800": 1}')
    @example(b"\xff\xfe")
    def check(content: bytes) -> None:
        check_json(kind, content, own)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", JSONS)
def test_broken_jsons(kind: str, own: Path) -> None:
    @cases(150)
    @given(mutated(JSONS[kind][0]).map(json_of).map(str.encode) | spliced(json_of(JSONS[kind][0])))
    def check(content: bytes) -> None:
        check_json(kind, content, own)

    check()


@cases(150)
@given(
    st.sampled_from(sorted(METHODS)),
    st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=4),
    st.integers() | st.none(),
    st.integers(),
)
@example("lora", {"batch_size": 2**31 - 1, "seq_len": 100}, None, 1)
@example("full", {"rank": 3}, None, 10**40)
def test_questions_about_memory(method: str, options: dict[str, Any], responses: int | None, gpus: int) -> None:
    model = find_described("llama-3.2-1b")

    def load() -> None:
        answer_by_formula(ask(model, {"method": method, **options}, responses=responses, gpus=gpus)).to_json()

    loads_or_refuses(load)


@cases(150)
@given(TEXT | st.from_regex(r"\s*[0-9]{1,400}(\.[0-9]*)?\s*[a-zA-Z]{0,3}", fullmatch=True))
@example("9" * 400 + "GiB")
def test_cards_and_models_by_any_name(name: str) -> None:
    loads_or_refuses(lambda: find_gpu(name))
    if "/" not in name:  # such a name would be looked for on a hub
        loads_or_refuses(lambda: find_described(name))
    loads_or_refuses(lambda: find_model(name))
    loads_or_refuses(lambda: find_task(name))
    loads_or_refuses(lambda: expand(name))


# Prompts and responses.

ANYTHING = st.one_of(
    st.text(st.characters(), max_size=30),
    st.sampled_from(
        [
            "",
            " ",
            "\x00",
            "\n",
            "\r",
            "\u2028",
            "\u2029",
            "\x85",
            "\u202e",
            "é",
            "👩‍👩‍👧",
            "\ud800",
            "<eos>",
            "{{x}}",
            "x" * 300,
        ]
    ),
)


def write_task(own: Path, lines: list[bytes]) -> None:
    (own / "experiments/tasks.yaml").write_text("mine:\n  source: {kind: jsonl, path: mine.jsonl}\n")
    scoring.lm_eval_file("mine").write_text("task: mine\n")
    (own / "mine.jsonl").write_bytes(b"\n".join(lines))
    shutil.rmtree(own / "resources/tasks", ignore_errors=True)
    forget_files()


FILLING = [json.dumps({"prompt": f"What is {n}?", "response": str(n)}).encode() for n in range(60)]


def is_text(text: str) -> bool:
    return bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


def check_items(prompt: str, response: str, as_ascii: bool, own: Path, tokenizer: Any) -> None:
    line = json.dumps({"prompt": prompt, "response": response}, ensure_ascii=as_ascii)
    write_task(own, [*FILLING[:7], line.encode(errors="surrogatepass"), *FILLING[7:]])
    if not (is_text(prompt) and is_text(response)):
        with pytest.raises(InputError) as caught:
            make_task("mine")
        assert [problem.where for problem in caught.value.problems] == ["mine.jsonl: line 8"]
        assert not list(Path("resources/tasks").glob("mine*"))
        return
    make_task("mine")
    items = [item for split in SPLITS for item in read_split("mine", split)]
    assert Item(prompt, response.strip()) in items or prompt in {f"What is {n}?" for n in range(60)}
    (found,) = [item for item in items if item.prompt == prompt]
    try:
        examples = tokenise([found, items[0]], tokenizer, 256)
    except InputError as error:
        assert len(f" {found.response}".encode()) + 2 > 256
        assert repr(prompt[:60])[:8] in error.problems[0].where
        return
    for batch in (collate(examples, 0), pack([examples], 0)):
        assert int((batch.labels != IGNORED).sum()) == sum(len(e.tokens) - e.prompt_length for e in examples)
        assert int((batch.kept_labels != IGNORED).sum()) == int(batch.response_tokens)
    if not re.search("<(bos|eos|pad|unk)>", prompt + response):
        tokens = examples[0].tokens
        assert tokenizer.decode(tokens[examples[0].prompt_length : -1]) == f" {found.response}"
    path = own / "items.jsonl"
    _write_items(path, [found], [(1.0, 2)], [{"item": 0, "answer": found.response, "correct": 1}])
    (row,) = [json.loads(text) for text in path.read_bytes().decode().split("\n") if text]
    assert (row["prompt"], row["target"], row["answer"]) == (prompt, found.response, found.response)


@pytest.fixture
def tokenizer(toy: Path, make_spec: Callable[..., Any]) -> Any:
    return load_tokenizer(make_spec(method="lora"))


@cases(60)
@given(prompt=ANYTHING, response=ANYTHING, as_ascii=st.booleans())
def test_a_few_prompts_and_responses(prompt: str, response: str, as_ascii: bool, tokenizer: Any, own: Path) -> None:
    check_items(prompt, response, as_ascii, own, tokenizer)


@pytest.mark.slow
@cases(500)
@given(prompt=ANYTHING, response=ANYTHING, as_ascii=st.booleans())
def test_prompts_and_responses(prompt: str, response: str, as_ascii: bool, tokenizer: Any, own: Path) -> None:
    check_items(prompt, response, as_ascii, own, tokenizer)


BROKEN_LINES = st.sampled_from(
    [
        b"nonsense",
        b"[]",
        b"null",
        b'{"prompt": "a"}',
        b'{"response": "a"}',
        b'{"prompt": null, "response": "a"}',
        b'{"prompt": "a", "response": true}',
        b'{"prompt": "a", "response": ["b"]}',
        b'{"prompt": "", "response": "a"}',
        b'{"prompt": "a", "response": " "}',
        b'{"prompt": "\\ud800", "response": "a"}',
        b'{"prompt": "\xff", "response": "a"}',
        b"[" * 100_000,
        b'{"prompt": 1, "response": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b"\x00",
    ]
)


@cases(40)
@given(broken=st.dictionaries(st.integers(0, 60), BROKEN_LINES, min_size=1, max_size=30))
def test_every_broken_line_is_named(broken: dict[int, bytes], own: Path) -> None:
    lines = [broken.get(number, line) for number, line in enumerate([*FILLING, b""])]
    write_task(own, lines)
    error = loads_or_refuses(lambda: make_task("mine"))
    assert isinstance(error, InputError)
    wanted = [f"mine.jsonl: line {number + 1}" for number in sorted(broken)]
    shown = [problem.where for problem in error.problems]
    assert shown[: tasks.SHOWN_LINES] == wanted[: tasks.SHOWN_LINES]
    if len(wanted) > tasks.SHOWN_LINES:
        assert error.problems[-1].message == f"{len(wanted) - tasks.SHOWN_LINES} more lines hold no item"
