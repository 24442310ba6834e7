"""The ledger's claims, read once, and what is found about one of their parts now."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pandas as pd
from conftest import REPOSITORY

from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.ledger import Claim, Part, read_ledger
from peftscope.claims.stored import read_findings
from peftscope.claims.verdict import Verdict
from peftscope.layout import CLAIMS_FILE, results_folder

PUBLISHED_CLAIMS = REPOSITORY / "results/published/claims.json"


@cache
def claims() -> dict[str, Claim]:
    """Returns the claims of the ledger by their names, without a look at their checks, which need torch."""
    return {claim.id: claim for claim in read_ledger(REPOSITORY / CLAIMS_FILE, checks=False)}


@cache
def published_findings() -> list[dict[str, Any]]:
    """Returns the published findings, which a test that changes them has to copy."""
    return read_findings(PUBLISHED_CLAIMS)


def write_results(
    study: str, runs: list[dict[str, Any]] | pd.DataFrame, tuned: Any = (), **fields: Any
) -> pd.DataFrame:
    """Writes the results of a study: its runs, with fields that all have, and the rate of each arm or what is tuned."""
    folder = results_folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(runs).assign(**fields)
    table.to_csv(folder / "runs.csv", index=False)
    chosen = {"learning_rate": 1e-3, "tried": [], "regret_rms": 0.0}
    arms = tuned if isinstance(tuned, dict) else dict.fromkeys(tuned, chosen)
    (folder / "tuned.json").write_text(json.dumps({"arms": arms}))
    return table


def published_verdict(claim: str, part: Part) -> str:
    """Returns the published verdict on a part of a claim."""
    asked = json.loads(json.dumps(part.with_))
    parts = next(finding["parts"] for finding in published_findings() if finding["id"] == claim)
    return [found["verdict"] for found in parts if (found["check"], found["with"]) == (part.check, asked)][-1]


def part_of(claim: str, index: int = -1, **changed: Any) -> Part:
    """Returns a part of a claim, by default the last, with some of its check's parameters changed."""
    return changed_part(claims()[claim].parts[index], **changed)


def part_with(claim: str, check: str, **given: Any) -> Part:
    """Returns the last part of a claim with this check and these parameters."""
    parts = [part for part in claims()[claim].parts if part.check == check and given.items() <= part.with_.items()]
    assert parts, f"{claim} has no part with {check} and {given}"
    return parts[-1]


def changed_part(part: Part, **changed: Any) -> Part:
    return part.model_copy(update={"with_": {**part.with_, **changed}})


def deciding(claim: str) -> list[Part]:
    return [part for part in claims()[claim].parts if part.decides]


def verdicts_of(claim: str) -> list[Verdict]:
    """Returns what is found now about each part that decides a claim."""
    return [evaluate_part(part).verdict for part in deciding(claim)]
