"""``peftscope claims``: measures claims and prints their verdicts."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from peftscope.cli.memory import with_progress
from peftscope.errors import InputError, Problem, close_match
from peftscope.execution.libraries import offline

app = typer.Typer()


@app.command()
def claims(
    ids: Annotated[list[str] | None, typer.Option("--id", help="Only this claim, as in S64; may be repeated.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only claims with a part of this kind, as in numerics.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write results/claims.json and reports/claims.html.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: what claims.json holds.")] = False,
) -> None:
    """Measure what the literature claims, and print each claim's verdict."""
    from typing import get_args

    from peftscope.claims.evaluate import evaluate
    from peftscope.claims.ledger import Kind, read_ledger
    from peftscope.hardware.device import processor_name
    from peftscope.report.claims import spoken_finding, write_claims_page

    ledger = read_ledger()
    known = {claim.id: claim for claim in ledger}
    for name in ids or []:
        if name not in known:
            raise InputError(Problem("--id", f"no such claim (got {name!r})", close_match(name, known)))
    if kind is not None and kind not in get_args(Kind):
        raise InputError(Problem("--kind", f"no such kind (got {kind!r})", close_match(kind, get_args(Kind))))
    if write and (ids or kind):
        raise InputError(Problem("--write", "writes all claims", "leave --id and --kind out"))
    chosen = [
        claim
        for claim in ledger
        if (not ids or claim.id in ids) and (kind is None or any(part.kind == kind for part in claim.parts))
    ]
    if not chosen:
        raise InputError(Problem("--kind", f"none of {', '.join(ids or [])} has a part of kind {kind}", "leave it out"))
    hardware = processor_name()
    with offline():
        measured = with_progress(evaluate(chosen, ledger), len(chosen), "measuring claims")
        found = [finding.to_json(hardware) for finding in measured]
    if write:
        page = write_claims_page(ledger, found)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    table = Table("id", "verdict", "claimed", "found", "claim", box=None)
    for finding in found:
        statement = known[finding["id"]].statement
        table.add_row(finding["id"], finding["verdict"], finding["claimed"], spoken_finding(finding), statement)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    if len(found) == 1:
        for part in found[0]["parts"]:
            rule = f"; the claim holds if it {part['rule']}" if part["rule"] else ""
            said = [f"{part['measures']}: {spoken_finding(part)}, {part['verdict']}{rule}", part["reason"]]
            if part["p_adjusted"] is not None:
                said.append(f"p = {part['p_adjusted']:.3g} after Holm's correction among {part['family']}")
            text = ". ".join(filter(None, said))
            console.print(text, markup=False)
            for name, value in part["evidence"].items():
                console.print(f"  {name}: {value}", markup=False)
    if write:
        console.print(f"The page: {page}")
