"""Reads ``claims.json`` files: their measurements, and what decided each claim. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peftscope.claims.evaluate import check_key
from peftscope.claims.ledger import Change, Claim, Part
from peftscope.claims.measurement import Measurement
from peftscope.claims.verdict import Verdict
from peftscope.errors import InputError, Problem
from peftscope.files.content import parse_json, read_text
from peftscope.layout import CLAIMS_RESULTS, published
from peftscope.planning.published import LARGEST_BYTES


def read_findings(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a ``claims.json``.

    Raises:
        InputError: The file cannot be read, or is no ``claims.json``.
    """
    findings: list[dict[str, Any]] = parse_json(read_text(path, LARGEST_BYTES), str(path))
    remedy = "give the file that `peftscope claims --write` made"
    if not findings:
        raise InputError(Problem(str(path), f"not a claims.json: it has no claims (got {findings!r})", remedy))
    try:
        for finding in findings:
            finding["id"] = str(finding["id"])
            for verdict in (finding["verdict"], *(part["verdict"] for part in finding["parts"])):
                Verdict(verdict)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(Problem(str(path), f"not a claims.json: {error!r}", remedy)) from None
    return findings


def published_findings(ids: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the published entries on some claims.

    Raises:
        InputError: None of them is published.
    """
    path, wanted = published(CLAIMS_RESULTS.name), set(ids)
    if not (found := [finding for finding in read_findings(path) if finding["id"] in wanted]):
        raise InputError(Problem(str(path), f"nothing on {', '.join(sorted(wanted))}", "leave --published out"))
    return found


def stored_measurements(findings: Iterable[dict[str, Any]]) -> dict[str, Measurement]:
    """Returns the measurements of findings, each under its ``check_key``."""
    return {
        check_key(part["check"], part["with"]): Measurement(
            part["found"],
            **{name: part[name] for name in ("low", "high", "n", "evidence", "model", "tuning_error", "p_adjusted")},
            **{name: part[name] for name in ("matters", "spoiled_by") if name in part},
            samples=tuple(part["samples"]),
            axes=tuple(part["axes"]),
            run_ids=tuple(part["run_ids"]),
            curves={name: {float(x): y for x, y in curve.items()} for name, curve in part["curves"].items()},
        )
        for finding in findings
        for part in finding["parts"]
        if part["found"] is not None
    }


def unexplained_changes(
    claims: Sequence[Claim], history: Sequence[Change], published: Iterable[dict[str, Any]]
) -> Iterator[str]:
    """Yields the id of every claim that is gone, or decided otherwise than in a published file, without a new entry.

    Args:
        claims: The ledger.
        history: All entries of its history.
        published: The findings of the published file, each with the entries that it had then.
    """
    before = {finding["id"]: finding for finding in published}
    yield from before.keys() - {claim.id for claim in claims} - {change.claim for change in history}
    for claim in claims:
        if claim.id not in before:
            continue
        deciding = [part for part in claim.parts if part.decides]
        stored = [part for part in before[claim.id]["parts"] if not part.get("elsewhere")]
        decided = [part for part in stored if part["role"] != "beside"]
        same = len(deciding) == len(decided) and all(map(_decides_alike, deciding, decided))
        own = [change for change in history if change.claim == claim.id]
        entries = [change.model_dump(mode="json", exclude_defaults=True) for change in own]
        if not same and all(entry in before[claim.id]["history"] for entry in entries):
            yield claim.id


def _decides_alike(part: Part, stored: dict[str, Any]) -> bool:
    """Returns whether a part measures and asks what a stored one did."""
    if part.rule is None:
        return not stored["check"] and part.measures == stored["measures"]
    judged = part.rule.model_dump(exclude_defaults=True)
    return (part.check, part.with_, judged) == (stored["check"], stored["with"], stored["judged"])
