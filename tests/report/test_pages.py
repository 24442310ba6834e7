"""Texts of people and machines stand on pages as text: no element comes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from peftscope.analysis.collect import collect_experiment, read_runs
from peftscope.claims.ledger import read_ledger
from peftscope.planning.sweep import expand
from peftscope.record import RunRecord, write_record
from peftscope.report.claims import write_claims_page
from peftscope.report.page import write_report
from peftscope.report.plots import write_figures
from peftscope.report.tables import html, write_tables

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"><b id=evil>| [x](javascript:alert(3))"


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts, self.text, self._inside = "", "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts += data
        self.text += data

    def check(self) -> None:
        """Raises where anything of EVIL became an element."""
        assert "alert(1)" in self.text
        assert "alert" not in self.scripts
        for tag, attributes in self.found:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            assert attributes.get("id") != "evil"
            assert not (attributes.get("src") or "data:").startswith("x")
            assert not (attributes.get("href") or "").startswith("javascript")


class TestPages:
    @pytest.fixture
    def finished(self, own: Callable[..., Path]) -> str:
        """An experiment whose every text is evil, with records that say so as well."""
        fixed = {"model": "toy", "steps": 3, "heldout_items": 4, "generation_items": 0, "retention_tokens": 0}
        axes = {"method": ["lora", "full"], "targets": ["minimal", ["q_proj", "v_proj"]]}
        ladders = [{"centre": {"method": "lora"}, "axes": {"rank": [2, 4]}}]
        experiment = {"title": EVIL, "description": EVIL, "fixed": fixed, "axes": axes, "ladders": ladders}
        own("mine", json.dumps({**experiment, "seeds": [0, 1]}))
        sweep = expand("mine")
        material = {"name": EVIL, "licence": EVIL, "note": EVIL}
        provenance = {
            "model": material,
            "task": material,
            "started_at": EVIL,
            "code": {"commit": EVIL},
            "hardware": {"cpu": EVIL, "gpu": EVIL, "cores": 1, "memory_bytes": 2**30},
            "packages": {"torch": EVIL},
        }
        for number, (identity, spec) in enumerate(sweep.runs.items()):
            record = RunRecord(run_id=identity, status="ok" if number else "failed", spec=spec, provenance=provenance)
            record.reason = None if number else EVIL
            record.quality.heldout_nll = 1.0 + number
            record.memory.train.peak_tensor_bytes = record.memory.load.peak_tensor_bytes = 2**20 * (number + 1)
            record.train_nll = [3.0, 2.0, 1.0]
            write_record(Path("results/runs") / identity / "record.json", record)
        collect_experiment(sweep)
        return "mine"

    def test_the_report(self, finished: str) -> None:
        write_tables(finished)
        write_figures(finished)
        page = Elements(write_report(finished).read_text())
        page.check()
        assert [tag for tag, _ in page.found].count("script") == 1
        assert page.text.count("<script>alert(1)</script>") >= 8  # title, twice, description, reason, facts, materials

    def test_tables(self, finished: str) -> None:
        runs = read_runs(finished).assign(label=EVIL)
        Elements(html(runs[["run_id", "label", "reason"]].rename(columns={"reason": EVIL}), "runs")).check()

    def test_markdown(self, finished: str) -> None:
        from peftscope.report.tables import markdown

        text = markdown(read_runs(finished).assign(label=EVIL + "\n# x")[["run_id", "label"]])
        assert "<script" not in text and "<img" not in text and "\n#" not in text
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {3}

    def test_claims(self, own: Callable[..., Path]) -> None:
        part = {
            "kind": "arithmetic",
            **{"quotes": EVIL, "measures": EVIL},
            "unit": EVIL,
            "scope": EVIL,
            "counts.quotient": {"numerator": 16777216, "denominator": 65536},
            "rule": {"equals": 3},
        }
        texts = dict.fromkeys(("statement", "sentence", "source", "claimed", "scope", "note", "correction"), EVIL)
        claim = texts | {"parts": [part | {"declared": EVIL}, part]}
        own("claims", json.dumps({"claims": {EVIL: {"S1": claim}}}))
        ledger = read_ledger()
        found = {
            **{"kind": EVIL, "measures": EVIL, "scope": EVIL, "unit": EVIL, "rule": EVIL, "model": EVIL, "check": EVIL},
            **{"found": 1, "low": None, "high": None, "n": 1, "verdict": "wrong", "reason": EVIL, "family": EVIL},
            **{"p_adjusted": 0.1, "evidence": {EVIL: EVIL}, "curves": {EVIL: {"1": 1, "2": 3}}, "axes": [EVIL, EVIL]},
            **{"run_ids": [EVIL], "role": "condition", "quotes": EVIL, "declared": EVIL, "known": EVIL},
        }
        history = [{"claim": "S1", "date": "2026-01-01", "was": EVIL, "became": EVIL, "why": EVIL}]
        finding = {**found, "id": "S1", "hardware": EVIL, "claimed": EVIL, "parts": [found, found]}
        finding |= {"history": history, "worlds": [EVIL], "moved": [{"date": EVIL, "from": EVIL}]}
        path = write_claims_page(ledger, [finding])
        Elements(path.read_text()).check()
        text = path.with_suffix(".md").read_text()
        assert "<script" not in text and "<img" not in text
        assert text.count("<details>") == text.count('<summary><b id="S1">') == text.count("</details>") == 1
