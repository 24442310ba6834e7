"""The calculator's page: its form, what it asks, and the page itself in a real browser."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import Command, launched, python
from test_memory import small_shape

from peftscope.memory.question import BESIDE_OPTIONS, METHOD_OPTIONS, SPEC_OPTIONS
from peftscope.methods import METHODS
from peftscope.sizing import page as asked
from peftscope.spec import RunSpec

TINY = small_shape(family="qwen2", vocab_size=4096, max_seq_len=512).to_config()
FIRST_SECONDS, LOADED_SECONDS = 10, 5
"""The aims: the first answer after navigation, and after Python is there."""
BUSY = 4
"""What a machine takes longer that runs something else on every core."""


# The form and the questions, without a browser.


def test_the_page_brings_every_room_that_its_answers_need(repository: Path) -> None:
    code = "import json, sys; from peftscope.sizing import page; "
    code += "setting = json.dumps({'model': 'llama-2-7b', 'gpu': '24GiB'})"
    code += "; page.form(); page.answer(setting); page.why(setting, setting); next(page.fits(setting))"
    code += "; print(*(name for name in sys.modules if name.startswith('peftscope.')))"
    done = python("-c", code, check=True, cwd=repository)
    needed = {name.split(".")[1] for name in done.stdout.split()}
    build = runpy.run_path(str(repository / "calculator" / "build.py"))
    assert {"memory", "sizing", "words"} <= needed <= {room.removesuffix(".py") for room in build["ROOMS"]}


def test_the_form_has_every_option_of_a_run_and_its_method() -> None:
    form = asked.form()
    fields = {field["name"]: field for field in form["fields"]}
    offered = {name: METHODS[name] for name in form["methods"]}
    assert set(fields) == {*SPEC_OPTIONS, *BESIDE_OPTIONS} | {
        name for name in METHOD_OPTIONS if any(name in method.model_fields for method in offered.values())
    }
    for name in METHOD_OPTIONS:
        if name in fields:
            assert set(fields[name]["defaults"]) == {m for m, method in offered.items() if name in method.model_fields}
    assert fields["rank"]["kind"] == "whole" and fields["dropout"]["kind"] == "number"
    assert fields["precision"]["choices"] == ["fp32", "bf16", "amp"] and fields["checkpointing"]["kind"] == "switch"
    assert fields["loss_path"]["defaults"] == {"": "hf"}, "the calculator's, not the runs'"
    assert fields["seq_len"]["defaults"] == {"": 512}
    assert fields["optimizer"]["help"] == RunSpec.model_fields["optimizer"].description


def test_what_is_wrong_is_told_with_its_field(in_tmp: None) -> None:

    def problems(**settings: Any) -> list[dict[str, str]]:
        return json.loads(asked.answer(json.dumps({"model": "llama-2-7b", "method": "lora"} | settings)))["problems"]

    (rank,) = problems(rank=0)
    assert rank["where"] == "rank" and "got 0" in rank["message"]
    (card,) = problems(gpu="rtx4091")
    assert card["where"] == "gpu" and "rtx4090" in card["remedy"]
    (config,) = problems(config="{")
    assert "not valid JSON" in config["message"]
    (kind,) = problems(config=json.dumps(TINY | {"model_type": "stablelm"}))
    assert "no closed form" in kind["message"]
    fits = list(asked.fits(json.dumps({"model": "llama-2-7b", "gpu": "24GiB", "seq_len": 5000})))
    assert len(fits) == len(asked.form()["methods"]) and all("limit of 4096" in fit for fit in fits)
    (nothing,) = asked.fits(json.dumps({"model": "lama-2-7b", "gpu": "24GiB"}))
    assert "did you mean `llama-2-7b`" in nothing


def test_what_the_page_loads_is_pinned_by_checksums(repository: Path) -> None:
    folder = repository / "calculator"
    lines = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    lock = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert all(entry["integrity"].startswith("sha512-") for name, entry in lock.items() if name)
    assert "http" not in (folder / "package-lock.json").read_text(), "the registry is the one that npm is set up for"
    assert not re.findall(r"https?:", "".join((folder / name).read_text() for name in ("page.js", "worker.js")))


# The page in Chromium.


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Visit:
    """An open page, and what it asked for and complained about since."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def ask(self, settings: dict[str, Any]) -> None:
        """Goes to the link of these settings, and waits for everything that follows."""
        said = {name: "on" if value is True else "off" if value is False else value for name, value in settings.items()}
        self.follow(partial(self.page.evaluate, "address => { location.hash = address }", urlencode(said)))

    def follow(self, act: Callable[[], Any]) -> None:
        self.page.evaluate("() => { delete document.querySelector('main').dataset.done }")
        act()
        self.page.wait_for_selector("main[data-done][aria-busy=false]")

    def bytes_of(self, selector: str) -> list[int]:
        values = self.page.locator(f"{selector} data").evaluate_all("all => all.map(one => one.value)")
        return [int(value) for value in values]


@contextmanager
def visiting(folder: Path, chromium: str, width: int) -> Iterator[Visit]:
    """A page that sees a folder and nothing else."""
    elsewhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with served(folder) as address, launched(chromium, elsewhere) as browser:
        one = Visit(browser.new_page(viewport={"width": width, "height": 900}), address)
        one.page.set_default_timeout(240_000)  # for machines that are busy
        yield one


@pytest.fixture(scope="module")
def visit(chromium: str, calculator: Path) -> Iterator[Visit]:
    """The built page after its first answer."""
    with visiting(calculator, chromium, 1280) as one:
        one.page.goto(one.address)
        one.page.wait_for_selector("main[data-done]")
        yield one


@pytest.mark.browser
def test_the_first_answer_comes_soon_and_from_this_host_alone(visit: Visit) -> None:
    ready, answered = (
        visit.page.evaluate("name => performance.getEntriesByName(name)[0].startTime / 1000", name)
        for name in ("ready", "answered")
    )
    print(f"Python after {ready:.1f} s, the first answer after {answered:.1f} s")
    assert answered < BUSY * FIRST_SECONDS
    assert answered - ready < BUSY * LOADED_SECONDS
    assert {url for url in visit.requests if not url.startswith((visit.address, "data:"))} == set()
    assert visit.errors == []


SETTINGS: list[dict[str, Any]] = [
    {"model": "llama-2-7b", "method": "qlora", "as_trainer": "trl", "padding": "none"},
    {"model": "llama-2-7b", "method": "qlora", "rank": 64, "gpu": "rtx4090"},
    {"model": "llama-2-7b", "method": "full", "optimizer": "adamw_8bit", "gpus": 4},
    {"model": "llama-3-8b", "method": "qlora", "kbit_preparation": "peft", "checkpointing": True, "seq_len": 2048},
    {"model": "qwen2.5-0.5b", "method": "lora", "targets": "attention", "batch_size": 8, "dropout": 0.1},
    {"model": "qwen2.5-0.5b", "method": "lora", "targets": "q_proj,down_proj", "precision": "amp"},
    {"model": "qwen2.5-0.5b", "method": "full", "precision": "fp32", "optimizer": "sgd"},
    {"model": "qwen3-0.6b", "method": "dora", "rank": 4, "checkpointing": True},
    {"model": "qwen3-0.6b", "method": "adalora", "init_r": 16, "batch_size": 2},
    {"model": "llama-3.2-1b", "method": "lora", "attention": "eager", "seq_len": 300},
    {"model": "llama-3.2-1b", "method": "rslora", "adapter_dtype": "base", "gradient_accumulation": 4},
    {"model": "llama-3.2-1b", "method": "lora-plus", "packing": True},
    {"model": "llama-3.2-1b", "method": "prompt-tuning", "virtual_tokens": 20},
    {"model": "llama-3.2-1b", "method": "prefix-tuning", "virtual_tokens": 30, "batch_size": 4},
    {"model": "llama-3.2-1b", "method": "ia3", "loss_path": "response_only", "response_len": 100},
    {"model": "llama-3.2-1b", "method": "loftq", "rank": 32, "gpu": "24GiB"},
    {"model": "gemma-3-1b", "method": "pissa", "optimizer": "paged_adamw", "gpu": "h100"},
    {"model": "smollm3-3b", "method": "lora", "eval_batch_size": 64},
    {"model": "granite-3.1-2b", "method": "lora", "optimizer_implementation": "fused"},
    {"model": "olmo-2-1b", "method": "qlora", "double_quant": False, "attention": "flash_attention_2"},
]


FLAGS = {"packing": "--packed", "as_trainer": "--as"}


def words_of(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = FLAGS.get(name, f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}")
        words += [] if name == "model" else [flag] if isinstance(value, bool) else [flag, str(value)]
    return words


@pytest.mark.browser
def test_twenty_settings_have_the_numbers_of_the_command(visit: Visit, peftscope: Command) -> None:
    assert len(SETTINGS) == 20
    for settings in SETTINGS:
        visit.ask(settings)
        code, output, _ = peftscope("memory", settings["model"], *words_of(settings), "--json")
        assert code == 0, settings
        found = json.loads(output)
        peaks = [found[f"peak_{name}_bytes"] for name in ("allocated", "reserved", "device")]
        assert visit.bytes_of(".peaks") == peaks, settings
        assert visit.bytes_of(".bars") == list(found["phases"].values()), settings
        assert visit.bytes_of(".legend") == list(found["components"].values()), settings
    assert visit.errors == []


@pytest.mark.browser
def test_a_pasted_config_is_answered_and_what_fits_is_the_commands(visit: Visit, peftscope, tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    visit.ask({"config": json.dumps(TINY), "method": "dora", "seq_len": 64, "gpu": "0.6GiB"})
    options = ["--seq-len", "64", "--gpu", "0.6GiB", "--json"]
    said = json.loads(peftscope("memory", str(file), "--method", "dora", *options)[1])
    assert visit.bytes_of(".peaks")[0] == said["peak_allocated_bytes"]
    visit.follow(visit.page.locator("#fits > summary").click)
    rows = visit.page.locator("#fits tbody tr")
    fits = json.loads(peftscope("fit", str(file), *options)[1])
    for number, fit in enumerate(fits):
        cells = rows.nth(number).locator("td").all_inner_texts()
        assert cells[1] == fit["fits"] and cells[7] == fit["advice"]
        largest = [fit[f"largest_{name}"] for name in ("batch_size", "seq_len", "rank")]
        assert cells[4:7] == [str(size) if size else "-" for size in largest]
    assert rows.count() == len(fits)
    visit.follow(visit.page.locator("#fits > summary").click)
    visit.ask({"config": "{", "method": "lora"})
    assert "not valid JSON" in visit.page.locator(".problems").inner_text()


@pytest.mark.browser
def test_two_settings_are_explained_as_by_the_command(visit: Visit, peftscope: Command) -> None:
    visit.ask({"model": "llama-3.2-1b", "method": "qlora", "b.model": "llama-3.2-1b", "b.method": "lora", "b.rank": 64})
    said = json.loads(peftscope("why", "llama-3.2-1b", "qlora", "lora --rank 64", "--json")[1])
    shown = visit.page.locator("#why p").all_inner_texts()
    assert shown == said["sentences"]
    assert visit.bytes_of("#why tr:last-child") == [
        said["second_bytes"], said["first_bytes"], said["first_bytes"] - said["second_bytes"]
    ]  # fmt: skip
    assert visit.page.locator("#answers article").count() == 2


@pytest.mark.browser
def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page
    visit.ask({"model": "smollm2-135m", "method": "lora"})
    for summary in page.locator("#first summary, #answers summary").all():
        summary.focus()
        page.keyboard.press("Enter")
    stops = page.evaluate(
        """() => [...document.querySelectorAll("a, input, select, textarea, summary, [tabindex]")]
        .filter(one => one.checkVisibility()).map((one, number) => (one.dataset.stop = number))"""
    )
    page.locator("#link").focus()
    reached, ringed = set(), set()
    for _ in stops:
        stop, ring = page.evaluate(
            "() => [document.activeElement.dataset.stop, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.add(stop)
        ringed.add(ring)
        page.keyboard.press("Tab")
    assert reached >= {str(stop) for stop in stops}
    assert ringed == {"solid"}, "where the focus is can be seen"

    before = visit.bytes_of(".peaks")
    page.locator("#first [name=rank]").focus()
    visit.follow(partial(page.keyboard.type, "64"))
    assert "rank=64" in page.evaluate("location.hash")
    assert page.locator("#link").get_attribute("href") == page.evaluate("location.hash")
    assert visit.bytes_of(".peaks") > before
    page.locator("#compare").focus()
    visit.follow(partial(page.keyboard.press, "Space"))
    assert page.locator("#second [name=rank]").input_value() == "64"
    assert "take the same" in page.locator("#why p").first.inner_text()
    visit.follow(partial(page.keyboard.press, "Space"))
    assert not page.locator("#second").is_visible()


@pytest.mark.browser
def test_a_slow_answer_does_not_freeze_the_page(visit: Visit) -> None:
    visit.page.evaluate("() => { location.hash = 'model=llama-2-70b&method=dora&checkpointing=on' }")
    visit.page.wait_for_selector("main[aria-busy=true]")
    visit.page.locator("#first [name=rank]").fill("3")
    assert visit.page.locator("main").get_attribute("aria-busy") == "true"
    visit.page.wait_for_selector("main[data-done*='rank=3'][aria-busy=false]")


CONTRAST = """() => {
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = numbers(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  return [...document.querySelectorAll("body, small, a, input, select, th, td, dd, dt, li, strong, .faint, .yes, .no")]
    .filter(one => one.checkVisibility())
    .map(one => {
      const two = [light(numbers(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => b - a);
      return [(two[0] + 0.05) / (two[1] + 0.05), one.outerHTML.slice(0, 80)];
    }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "rank"), [("light", 4), ("dark", 5)])
def test_both_colour_schemes_read_well_at_every_width(scheme: str, rank: int, visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    same = {"model": "qwen2.5-0.5b", "method": "full", "gpu": "8GiB", "b.model": "qwen2.5-0.5b", "b.method": "qlora"}
    visit.ask(same | {"b.gpu": "8GiB", "b.rank": rank})
    for details in page.locator("details:not(#fits)").all():
        details.evaluate("one => { one.open = true }")
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        contrast, where = page.evaluate(CONTRAST)
        assert contrast >= 4.5, where
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.browser
def test_without_webassembly_a_sentence_says_so(visit: Visit) -> None:
    page = visit.page.context.browser.new_page()
    page.add_init_script("delete globalThis.WebAssembly")
    page.goto(visit.address)
    assert "no WebAssembly" in page.locator("#status").inner_text()
    assert not page.locator("main").is_visible()
    page.close()
