"""Whatever people write: it loads, or it is refused with a place and a reason, and never hangs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, forget_files
from fuzzing import TEXT, VALUES, cases, dumped, loads_or_refuses, mutated, spliced
from hypothesis import example, given
from hypothesis import strategies as st

from peftscope.claims.ledger import read_ledger
from peftscope.data import scoring, tasks
from peftscope.data.batching import IGNORED, collate, pack, tokenise
from peftscope.data.sources import Item
from peftscope.data.tasks import SPLITS, find_task, make_task, read_split
from peftscope.errors import InputError
from peftscope.evaluation.heldout import ItemLoss, write_items
from peftscope.files.content import LARGEST_BYTES, SHOWN_LINES, parse_json, read_yaml
from peftscope.hardware.cards import find_gpu
from peftscope.memory.answer import answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import METHOD_OPTIONS, ask
from peftscope.methods import METHODS
from peftscope.models import catalog
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.presets import PRESETS
from peftscope.planning.plan import plan_experiment
from peftscope.planning.resolve import spec_from
from peftscope.planning.sweep import expand
from peftscope.record import RunRecord, read_record, write_record
from peftscope.spec import RUN_ID_PATTERN, RunSpec, run_id
from peftscope.training.load import load_tokenizer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reason", ["", "\n\x00\u2028'\"", "👩‍👩‍👧"])
def test_specs_of_every_method_come_back_from_json_and_from_records(method, reason, make_spec, tmp_path) -> None:
    spec = make_spec(method=method, learning_rate=1e-7)
    for fields in (spec.canonical(), spec.model_dump(mode="json")):
        again = spec_from(parse_json(json.dumps(fields), "spec"), Path("spec"), "cpu")
        assert (again, run_id(again)) == (spec, run_id(spec))
    assert re.fullmatch(RUN_ID_PATTERN, run_id(spec))
    write_record(tmp_path / "record.json", RunRecord(run_id=run_id(spec), status="failed", reason=reason, spec=spec))
    found = read_record(tmp_path / "record.json")
    assert (found.spec, found.reason, found.run_id) == (spec, reason, run_id(spec))


# Broken files.

FOLDER = REPOSITORY / "experiments"


def tree_of(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def some_claims() -> dict[str, Any]:
    """One claim for every kind of part: the whole ledger takes seconds to parse."""
    ledger = tree_of("claims.yaml")
    chosen: dict[str, Any] = {}
    kinds, used = set(), set()
    for section, name, claim in ((s, n, c) for s, claims in ledger["claims"].items() for n, c in claims.items()):
        modules = {key.partition(".")[0] for part in claim["parts"] for key in part if "." in key}
        new = {(ledger["checks"][module]["kind"], *sorted(claim.get("rule", {}))) for module in modules} - kinds
        if (new or "study" in str(claim)) and sum(map(len, chosen.values())) < 12:
            kinds |= new
            used |= modules | {key for part in claim["parts"] for key in part}
            chosen.setdefault(section, {})[name] = claim
    return {"checks": {name: row for name, row in ledger["checks"].items() if name in used}, "claims": chosen}


def load_models() -> None:
    for name in catalog._catalog():
        find_model(name)
        assert model_folder(name).parent == catalog.MODELS_FOLDER
        assert ".." not in model_folder(name).parts


def load_tasks() -> None:
    for name in tasks._tasks():
        find_task(name)
        assert tasks.task_folder(name).parent == tasks.TASKS_FOLDER


SCORING = "tasks/two-digit-sums.yaml"
KINDS: dict[str, tuple[str, Any, Callable[[], Any]]] = {
    "smoke": ("mine.yaml", tree_of("smoke.yaml"), lambda: plan_experiment("mine")),
    "study": ("mine.yaml", tree_of("variants-60.yaml"), lambda: plan_experiment("mine")),
    "defaults": ("defaults.yaml", tree_of("defaults.yaml"), lambda: plan_experiment("smoke")),
    "models": ("models.yaml", tree_of("models.yaml"), load_models),
    "tasks": ("tasks.yaml", tree_of("tasks.yaml"), load_tasks),
    "claims": ("claims.yaml", some_claims(), read_ledger),
    "scoring": (SCORING, tree_of(SCORING), lambda: scoring.read_scoring("two-digit-sums")),
    "run": (
        "run.yaml",
        {"model": "toy", "method": "adalora", "init_r": 4, "target_r": 2, "targets": ["q_proj"], "steps": 9, "seed": 3},
        lambda: spec_from(read_yaml(Path("experiments/run.yaml")), Path("run.yaml"), "cpu"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files(kind: str, own_folder: Path) -> None:
    name, tree, load = KINDS[kind]
    path = own_folder / "experiments" / name
    before = path.read_bytes() if path.is_file() else None
    # The files with their comments, where they are short enough.
    text = (FOLDER / name).read_text() if kind in ("models", "tasks", "defaults") else dumped(tree).decode()

    @cases(8)
    @given(mutated(tree).map(dumped) | spliced(text))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        forget_files()
        try:
            loads_or_refuses(load)
        finally:
            path.unlink() if before is None else path.write_bytes(before)

    check()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
WORST = {
    "a billion laughs": (LAUGHS, "more than 500,000 values"),
    "a list in itself": ("fixed: &a {b: *a}", "nested deeper"),
    "deep": ("fixed: " + "[" * 1000, "nest"),
    "large": ("# " + "x" * LARGEST_BYTES, "more than the 1,000,000 allowed"),
    "a number of 5,000 digits": ("fixed: {steps: " + "9" * 5000 + "}", "more than 64 bits"),
    "a number of 20,000 bits": ("fixed: {steps: 0x" + "f" * 5000 + "}", "more than 64 bits"),
    "a seed beyond torch": ("fixed: {model: toy}\nseeds: [5000000000]", "less than or equal to 2147483647"),
    "a date that is none": ("fixed: {model: 2024-13-45}", "unknown model"),
    "a tag that does not fit": ("fixed: {steps: !!bool maybe}", "does not fit its tag"),
    "an object of Python": ("fixed: !!python/object/apply:os.system ['false']", "could not determine a constructor"),
    "half a surrogate pair": ('title: "\\ud800"', "line 1: not valid YAML"),
    "an escape beyond Unicode": ('title: "\\UFFFFFFFF"', "line 1: not valid YAML"),
    "a NUL": ("title: x\nfixed: \x00", "line 2: not valid YAML: the character U+0000"),
    "not UTF-8": (b"title: \xff", "cannot be read"),
    "two documents": ("title: x\n---\ntitle: y", "line 2"),
    "2^3000 runs": ("axes: {" + ", ".join(f"a{i}: [1,2]" for i in range(3000)) + "}", "describes 10^903 runs"),
    "10^9 rungs": (
        "seeds: &n [" + ",".join(map(str, range(10_000))) + "]\nladders:\n"
        "- &l {axes: {rank: &r [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}\n" + "- *l\n" * 10_000,
        "describes 1,000,100,000 runs",
    ),
    "one seed too many": (
        f"axes: {{rank: [{', '.join(map(str, range(1, 101)))}]}}\nseeds: [{', '.join(map(str, range(1001)))}]",
        "describes 100,100 runs, more than 100,000",
    ),
}


@pytest.mark.parametrize(("text", "words"), WORST.values(), ids=WORST)
def test_the_worst_files(text: str | bytes, words: str, own_folder: Path) -> None:
    (own_folder / "experiments/mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    error = loads_or_refuses(lambda: plan_experiment("mine"))
    assert isinstance(error, InputError)
    assert "experiments/mine.yaml" in str(error)
    assert words in str(error)


NOT_FILES = {"a folder": "experiments", "a device": "/dev/zero", "a long name": "x" * 5000, "a NUL": "a\x00b"}


@pytest.mark.parametrize("name", NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_file(name: str, own_folder: Path) -> None:
    assert isinstance(loads_or_refuses(lambda: read_yaml(Path(name))), InputError)


# JSON: specs on the command line, records, and descriptions of models.


def json_of(tree: Any) -> str:
    return json.dumps(tree, default=str)


OPTIONS = sorted({*RunSpec.model_fields, *METHOD_OPTIONS} - {"model", "task", "learning_rate", "device", "method"})
A_SPEC: dict[str, Any] = {"model": "toy", "task": "two-digit-sums", "learning_rate": 0.1, "seed": 1, "steps": 5}
A_WHOLE_SPEC = A_SPEC | {"method": {"name": "qlora", "rank": 4, "targets": ["q_proj"]}}
A_RECORD = RunRecord(
    run_id="x", status="ok", spec=RunSpec.model_validate(A_WHOLE_SPEC), train_nll=[1.0], method_metrics={"a": 1.0}
).model_dump(mode="json")
A_CONFIG = PRESETS["llama-3.2-1b"][1].to_config()


def read_spec(path: Path) -> RunSpec:
    return spec_from(parse_json(path.read_bytes().decode(errors="replace"), "spec"), Path("spec"), "cpu")


JSONS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "spec": (A_SPEC | {"method": "lora", "rank": 2}, read_spec),
    "whole spec": (A_WHOLE_SPEC, read_spec),
    "record": (A_RECORD, read_record),
    "config": (A_CONFIG, lambda path: answer(describe_model(str(path)))),
}


def answer(model: Any) -> None:
    """The closed form, where it knows the family."""
    question = ask(model, {"method": "lora", "seq_len": 16})
    if model.shape is not None:
        answer_by_formula(question).to_json()


@pytest.mark.parametrize("kind", JSONS)
def test_broken_jsons(kind: str, own_folder: Path) -> None:
    path = own_folder / "content.json"

    @cases(8)
    @given(mutated(JSONS[kind][0]).map(json_of).map(str.encode) | spliced(json_of(JSONS[kind][0])))
    @example(b"[" * 100_000)
    @example(b'{"a": ' * 5000)
    @example(b'{"method": "lora", "steps": ' + b"9" * 5000 + b"}")
    @example(b'{"method": "lora", "model": "\\ud800"}')
    @example(b'{"method": "lora", "\\ud800": 1}')
    @example(b"\xff\xfe")
    def check(content: bytes) -> None:
        path.write_bytes(content)
        loads_or_refuses(lambda: JSONS[kind][1](path))

    check()


@cases(20)
@given(
    st.sampled_from(sorted(METHODS)),
    st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=4),
    st.integers() | st.none(),
    st.integers(),
)
@example("lora", {"batch_size": 2**31 - 1, "seq_len": 100}, None, 1)
@example("full", {"rank": 3}, None, 10**40)
def test_questions_about_memory(method: str, options: dict[str, Any], responses: int | None, gpus: int) -> None:
    model = describe_model("llama-3.2-1b")

    def load() -> None:
        answer_by_formula(ask(model, {"method": method, **options}, responses=responses, gpus=gpus)).to_json()

    loads_or_refuses(load)


@cases(20)
@given(TEXT | st.from_regex(r"\s*[0-9]{1,400}(\.[0-9]*)?\s*[a-zA-Z]{0,3}", fullmatch=True))
@example("9" * 400 + "GiB")
def test_cards_and_models_by_any_name(name: str) -> None:
    loads_or_refuses(lambda: find_gpu(name))
    if "/" not in name:  # such a name would be looked for on a hub
        loads_or_refuses(lambda: describe_model(name))
    loads_or_refuses(lambda: find_model(name))
    loads_or_refuses(lambda: find_task(name))
    loads_or_refuses(lambda: expand(name))


# Prompts and responses of any text: an item that every part of the suite takes, or a line that is refused.

ODD = ["", " ", "é", "👩‍👩‍👧", "\ud800", "<eos>", "{{x}}", "x" * 300, *"\x00\n\r\u2028\u2029\x85\u202e"]
ANYTHING = st.one_of(st.text(st.characters(), max_size=30), st.sampled_from(ODD))


def write_task(own_folder: Path, lines: list[bytes]) -> None:
    (own_folder / "experiments/tasks.yaml").write_text("mine:\n  source: {kind: jsonl, path: mine.jsonl}\n")
    scoring.lm_eval_file("mine").write_text("task: mine\n")
    (own_folder / "mine.jsonl").write_bytes(b"\n".join(lines))
    shutil.rmtree(own_folder / "resources/tasks", ignore_errors=True)
    forget_files()


FILLING = [json.dumps({"prompt": f"What is {n}?", "response": str(n)}).encode() for n in range(60)]


def is_text(text: str) -> bool:
    return bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


@pytest.fixture
def tokenizer(toy: Path, make_spec: Callable[..., Any]) -> Any:
    return load_tokenizer(make_spec(method="lora"))


@cases(25)
@given(prompt=ANYTHING, response=ANYTHING, as_ascii=st.booleans())
def test_any_prompt_and_response_is_an_item_or_refused(
    prompt: str, response: str, as_ascii: bool, tokenizer: Any, own_folder: Path
) -> None:
    line = json.dumps({"prompt": prompt, "response": response}, ensure_ascii=as_ascii)
    write_task(own_folder, [*FILLING[:7], line.encode(errors="surrogatepass"), *FILLING[7:]])
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
    path = own_folder / "items.jsonl"
    write_items(path, [found], [ItemLoss(1.0, 2, "01")], [{"item": 0, "answer": found.response, "correct": 1}])
    (row,) = [json.loads(text) for text in path.read_bytes().decode().split("\n") if text]
    assert (row["prompt"], row["target"], row["answer"]) == (prompt, found.response, found.response)


BROKEN_LINES = st.sampled_from(
    [
        b"nonsense",
        b"[]",
        b'{"prompt": "a"}',
        b'{"prompt": null, "response": "a"}',
        b'{"prompt": "a", "response": true}',
        b'{"prompt": "a", "response": ["b"]}',
        b'{"prompt": "\xff", "response": "a"}',
        b"[" * 100_000,
        b'{"prompt": 1, "response": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b"\x00",
    ]
)


@cases(15)
@given(broken=st.dictionaries(st.integers(0, 60), BROKEN_LINES, min_size=1, max_size=30))
def test_every_broken_line_is_named(broken: dict[int, bytes], own_folder: Path) -> None:
    lines = [broken.get(number, line) for number, line in enumerate([*FILLING, b""])]
    write_task(own_folder, lines)
    error = loads_or_refuses(lambda: make_task("mine"))
    assert isinstance(error, InputError)
    wanted = [f"mine.jsonl: line {number + 1}" for number in sorted(broken)]
    shown = [problem.where for problem in error.problems]
    assert shown[:SHOWN_LINES] == wanted[:SHOWN_LINES]
    if len(wanted) > SHOWN_LINES:
        assert error.problems[-1].message == f"{len(wanted) - SHOWN_LINES} more lines are not items"


@pytest.mark.parametrize("path", ["x" * 5000, "a\x00b", "experiments", "/dev/zero", "nothing.jsonl"])
def test_data_that_are_no_file(path: str, own_folder: Path) -> None:
    write_task(own_folder, FILLING)
    source = {"kind": "jsonl", "path": path}
    (own_folder / "experiments/tasks.yaml").write_text(json.dumps({"mine": {"source": source}}))
    (own_folder / "experiments/mine.yaml").write_text("fixed: {model: toy, task: mine}\n")
    for load in (lambda: make_task("mine"), lambda: plan_experiment("mine")):
        assert "no such file" in str(loads_or_refuses(load))


def test_an_example_is_never_longer_than_a_sequence_and_has_a_prompt(tokenizer: Any) -> None:
    for length in range(1, 30):
        found = loads_or_refuses(lambda: tokenise([Item("question", "y" * length)], tokenizer, 20))  # noqa: B023
        assert isinstance(found, InputError) == (length > 17)
        if length <= 17:
            assert len(found[0].tokens) <= 20
            assert found[0].prompt_length >= 1
    with pytest.raises(InputError, match="its prompt has no token"):
        tokenise([Item("", "yes")], tokenizer, 20)
