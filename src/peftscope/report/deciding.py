"""Says what would decide a claim that is open, and what that costs. No torch."""

from __future__ import annotations

from typing import Any

import pandas as pd

from peftscope.analysis.study import StudyResults
from peftscope.claims.ledger import Claim
from peftscope.claims.verdict import Verdict
from peftscope.report.spoken import deciding
from peftscope.words import spoken_time

RUNS_AT_ONCE = 2
"""The runs that share a machine in an estimated time: one on each of two cores."""


def what_would_decide(claim: Claim, finding: dict[str, Any]) -> str:
    """Returns what would decide an open claim, with its price; empty for other verdicts.

    The entry's own words come first. Otherwise it is the runs that its studies lack: arms that ran at one chosen rate
    run at three, with the same seeds. Where more pairs are enough, the reason of the part says how many.
    """
    if finding["verdict"] != Verdict.OPEN:
        return ""
    parts = [part for part in deciding(finding) if part["verdict"] == Verdict.OPEN]
    return claim.decider or "; ".join(dict.fromkeys(filter(None, map(_further_runs, parts))))


def _further_runs(part: dict[str, Any]) -> str:
    """Returns the runs at other rates that a comparison of trained arms lacks, in words; empty if there are none."""
    asked = part["with"]
    if not part["check"].startswith("training.") or "study" not in asked:
        return ""
    study = StudyResults(asked["study"])
    named = [asked.get("arm"), asked.get("against")]
    named += [arm for field in ("arms", "ranks", "first", "second") for arm in asked.get(field, ())]
    arms = [arm for arm in dict.fromkeys(named) if arm in study.arms and not study.rate(arm).is_tuned]
    if not arms:
        return ""
    runs = pd.concat([study.arm_runs(arm) for arm in arms])
    more = 2 * len(runs)
    price = spoken_time(2 * float(runs["wall_seconds"].sum()) / RUNS_AT_ONCE)
    names = "; ".join(study.labels[arm] for arm in arms)
    return f"three rates with all seeds for these arms, {more} further runs, {price} on two cores: {names}"
