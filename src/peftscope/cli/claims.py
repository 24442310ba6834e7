"""``peftscope claims``: measures claims and prints their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from peftscope.cli.console import TRUE, print_json, wide_console, with_progress
from peftscope.errors import InputError, Problem, close_match, how_to_install, needs
from peftscope.execution.libraries import offline, quiet_libraries
from peftscope.layout import CLAIMS_FILE

if TYPE_CHECKING:
    from peftscope.claims.ledger import Claim

app = typer.Typer()

MEASURED_WITH = ("numpy", "torch", "peft", "scipy")
"""Packages without which nothing is measured: the published verdicts are told instead."""


@app.command(rich_help_panel=TRUE)
def claims(
    ids: Annotated[list[str] | None, typer.Option("--id", help="Only this claim, as in S64; may be repeated.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only claims with a part of this kind, as in numerics.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write results/claims.json and reports/claims.html.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: what claims.json holds.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Measure nothing: the published verdicts.")] = False,
    reuse: Annotated[Path | None, typer.Option(help="A claims.json; only --id and what it lacks is measured.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Write the skeleton of a claim, and say what it lacks.")] = False,
) -> None:
    """Measure what the literature claims, and print each claim's verdict."""
    from typing import get_args

    from peftscope.claims.ledger import Kind, read_ledger
    from peftscope.claims.stored import published_findings
    from peftscope.report.spoken import spoken_finding, spoken_known, spoken_scope, spoken_verdict, told

    if add:
        _add()
        return
    if published and (write or reuse):
        raise InputError(Problem("--published", "measures nothing", "leave --write and --reuse out"))
    if not (published or write or reuse or all(map(find_spec, MEASURED_WITH))):
        published = True
        note = f"published verdicts; to measure: {how_to_install('all')}"
        Console(stderr=True).print(note, markup=False, soft_wrap=True)
    with needs("all"):
        ledger = read_ledger(checks=not published)
    known = {claim.id: claim for claim in ledger}
    for name in ids or []:
        if name not in known:
            raise InputError(Problem("--id", f"no such claim (got {name!r})", close_match(name, known)))
    if kind is not None and kind not in get_args(Kind):
        raise InputError(Problem("--kind", f"no such kind (got {kind!r})", close_match(kind, get_args(Kind))))
    if write and (kind or (ids and not reuse)):
        raise InputError(Problem("--write", "writes all claims", "leave --id and --kind out"))
    chosen = [
        claim
        for claim in ledger
        if (not ids or write or claim.id in ids) and (kind is None or any(part.kind == kind for part in claim.parts))
    ]
    if not chosen:
        raise InputError(Problem("--kind", f"none of {', '.join(ids or [])} has a part of kind {kind}", "leave it out"))
    if published:
        found = published_findings(claim.id for claim in chosen)
    else:
        with needs("all"):
            found = _measure(chosen, ledger, reuse, ids or ())
    if write:
        from peftscope.report.claims import write_claims_page
        from peftscope.report.findings import write_findings

        page = write_claims_page(ledger, found)
        write_findings(ledger, found)
    if as_json:
        print_json(found)
        return
    console = wide_console()
    table = Table("id", "verdict", "claimed", "found", "claim", "holds for", box=None)
    for finding in found:
        verdict = spoken_verdict(finding) + (f" ({ways})" if (ways := spoken_known(finding)) else "")
        statement, scope = known[finding["id"]].statement, spoken_scope(finding)
        table.add_row(finding["id"], verdict, finding["claimed"], spoken_finding(finding), statement, scope)
    if len(found) > 1:
        console.print(table)
    else:
        name = found[0]["id"]
        for number, line in enumerate(told(found[0], known[name].statement)):
            console.print(f"{'' if number else name:4} {line}", markup=False, soft_wrap=True)
        for part in found[0]["parts"]:
            words = f", tests “{part['quotes']}”" if part["quotes"] else ""
            rule = f"; {part['rule']} counts as right" if part["rule"] else ""
            said = [f"{part['role']}{words}: {part['measures']}: {spoken_finding(part)}, {part['verdict']}{rule}"]
            said += [part["reason"]] if part["reason"] else []
            if part["p_adjusted"] is not None:
                said.append(f"p = {part['p_adjusted']:.3g} after Holm's correction for all comparisons of its study")
            console.print(". ".join(said), markup=False)
            for name, value in part["evidence"].items():
                console.print(f"  {name}: {value}", markup=False)
    if write:
        console.print(f"The page: {page}")


def _add() -> None:
    """Writes the skeleton of an entry at the end of the ledger, and prints what it lacks."""
    from peftscope.claims.ledger import read_ledger
    from peftscope.report.rendering import rendered

    if not CLAIMS_FILE.is_file():
        raise InputError(Problem("--add", f"there is no {CLAIMS_FILE} here", "work in a clone of the repository"))
    number = 1 + max(int(claim.id[1:]) for claim in read_ledger(CLAIMS_FILE, checks=False) if claim.id[0] == "P")
    CLAIMS_FILE.write_text(CLAIMS_FILE.read_text() + rendered("claim.yaml.j2", name=f"P{number}") + "\n")
    print(f"P{number} stands at the end of {CLAIMS_FILE}; docs/add-a-claim.md says what belongs there. It lacks:")
    try:
        read_ledger(CLAIMS_FILE)
    except InputError as error:
        print(*error.problems, sep="\n")


def _measure(
    chosen: Sequence[Claim], ledger: Sequence[Claim], reuse: Path | None, anew: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the findings on claims; what a file has measured is kept, but for the claims to measure anew."""
    from peftscope.claims.evaluate import check_key, evaluate
    from peftscope.claims.ledger import elsewhere, read_history
    from peftscope.claims.stored import read_findings, stored_measurements
    from peftscope.hardware.device import processor_name

    here, history = processor_name(), read_history()
    kept = [finding for finding in read_findings(reuse) if finding["id"] not in anew] if reuse else []
    hardware = {finding["id"]: finding["hardware"] for finding in kept}
    stored = stored_measurements(kept)
    for part in (part for claim in ledger if claim.id in anew for part in chain(claim.parts, *elsewhere(claim))):
        stored.pop(check_key(part.check, part.with_), None)  # another claim may have it too
    with quiet_libraries(), offline():
        measured = with_progress(evaluate(chosen, stored), len(chosen), "measuring claims")
        return [finding.to_json(hardware.get(finding.claim.id) or here, history) for finding in measured]
