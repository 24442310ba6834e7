"""The report of the check on a card: one page without anything from outside. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from peftscope.analysis.cards import CARD_FILE, KINDS, read_facts, read_rows
from peftscope.errors import InputError, spoken_bytes

MEMORY = ("allocated", "reserved", "device")
GIGA, TERA, MILLI = 1e9, 1e12, 1e-3

CAPTIONS = {
    "fits": "Does it fit? Runs that are held to a smaller card's memory, the context taken off",
    "steps": "Training steps: time, speed, and their peak",
    "latency": "Latency of one forward pass with the adapter apart, merged, and of the base alone",
    "memory": "Peaks of two training steps and an evaluation",
}


def write_page(output: Path, jobs: Sequence[tuple[str, str]]) -> Path:
    """Renders ``report.html`` beside the results, and returns its path.

    Args:
        output: The folder of a card's results.
        jobs: Kind and label of everything that can be measured; what has no row is shown as waiting.
    """
    facts = read_facts(output / CARD_FILE)
    rows = {kind: read_rows(output / f"{kind}.json") for kind in KINDS}
    waiting = {kind: [label for of, label in jobs if of == kind and label not in rows[kind]] for kind in KINDS}
    on_card = facts["device"] == "cuda"
    claims, why_no_claims = _judged(output)
    for claim in claims if not on_card else []:
        claim["reason"] = "waits for a CUDA card"
    environment = Environment(
        loader=PackageLoader("peftscope.gpu", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"gib": _spoken_bytes, "shown": _shown, "percent": _percent}
    errors = [abs(row["allocated_error_percent"]) for row in _compared(rows)]
    text = environment.get_template("report.html.j2").render(
        facts=facts,
        on_card=on_card,
        tables={kind: _table(kind, list(rows[kind].values())) for kind in KINDS},
        captions=CAPTIONS,
        waiting=waiting,
        claims=claims,
        why_no_claims=why_no_claims,
        decided=sum(row["verdict"] != "not run" for row in claims),
        bars=_bars(rows),
        mean_error=sum(errors) / len(errors) if errors else None,
        worst_error=max(errors, default=None),
        state=_state(facts),
    )
    path = output / "report.html"
    path.write_text(text)
    return path


def _judged(output: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns every part of a claim that a card decides, with its verdict by these results, or why there are none."""
    try:
        from peftscope.claims.evaluate import evaluate_part
        from peftscope.claims.ledger import read_ledger

        try:
            ledger = read_ledger()
        except InputError as error:
            return [], str(error)
        judged = []
        for claim in ledger:
            for part in (part for part in claim.parts if part.kind == "gpu"):
                mine = part.model_copy(update={"with_": part.with_ | {"results": str(output)}}) if part.check else part
                found = evaluate_part(mine).to_json()
                judged.append({"id": claim.id, "statement": claim.statement, **found})
        return judged, ""
    except ImportError as error:
        return [], f"this machine has no package {error.name}, which verdicts need"


def _compared(rows: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the rows with a peak of tensors, predicted and measured."""
    return [row for kind in KINDS for row in rows[kind].values() if row.get("allocated_error_percent") is not None]


def _bars(rows: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns label, predicted and measured peak, and both in percent of the largest."""
    compared = _compared(rows)
    names = ("predicted", "measured")
    largest = max((row[f"{name}_allocated_bytes"] for row in compared for name in names), default=1)
    return [
        {"label": row["spec"], "error": row["allocated_error_percent"]}
        | {name: row[f"{name}_allocated_bytes"] for name in names}
        | {f"{name}_width": 100 * row[f"{name}_allocated_bytes"] / largest for name in names}
        for row in compared
    ]


def _state(facts: dict[str, Any]) -> dict[str, str]:
    """Returns what is known of the card, in words; what it does not tell is left out."""
    ceilings = facts["ceilings"]
    state = {
        "memory": _spoken_bytes(facts["memory_bytes"]),
        f"matrix product ({ceilings['dtype']})": f"{ceilings['matmul_flops_per_second'] / TERA:,.4g} TFLOP/s",
        "copy": f"{ceilings['copy_bytes_per_second'] / GIGA:,.4g} GB/s",
    }
    for when in ("idle", "loaded"):
        reading = facts.get(when) or {}
        parts = [f"{reading[key]:g} {unit}" for key, unit in UNITS.items() if reading.get(key) is not None]
        state |= {when: ", ".join(parts)} if parts else {}
    others = facts.get("other_processes") or []
    state["other processes"] = ", ".join(f"process {other['pid']}" for other in others) or "none seen"
    versions = facts["versions"] | ({"CUDA": facts["cuda"]} if facts.get("cuda") else {})
    return state | {"versions": ", ".join(f"{name} {value}" for name, value in versions.items())}


UNITS = {
    "sm_clock_mhz": "MHz",
    "memory_clock_mhz": "MHz (memory)",
    "power_watts": "W",
    "power_limit_watts": "W (limit)",
    "temperature_celsius": "°C",
}


def _table(kind: str, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns the cells of a kind's table; kinds of memory that a processor does not have are left out."""
    columns = {"latency": _latency_cells, "steps": lambda row: _step_cells(row, rows), "fits": _fit_cells}
    cells = columns.get(kind, lambda row: {})
    known = [name for name in MEMORY if any(row.get(f"measured_{name}_bytes") is not None for row in rows)]
    return [
        {"run": str(row["spec"]), **cells(row), **(_peak_cells(row, known) if kind != "latency" else {})}
        | {"outcome": _outcome(row)}
        for row in rows
    ]


def _peak_cells(row: dict[str, Any], known: list[str]) -> dict[str, str]:
    cells = {}
    for name in known:
        cells[f"{name}: predicted"] = _spoken_bytes(row.get(f"predicted_{name}_bytes"))
        cells[f"{name}: measured"] = _spoken_bytes(row.get(f"measured_{name}_bytes"))
        cells[f"{name}: error"] = _percent(row.get(f"{name}_error_percent"))
    return cells


def _fit_cells(row: dict[str, Any]) -> dict[str, str]:
    return {"held to": f"{row['limit']}, {_spoken_bytes(row['capacity_bytes'])}"}


def _latency_cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {
        f"{name}, {state} (ms)": _shown(row.get(f"{state}_{name}_seconds"), MILLI)
        for name in ("prompt", "token")
        for state in ("base", "apart", "merged")
    }
    for ratio in ("prompt_apart_over_merged", "token_apart_over_merged", "token_merged_over_base"):
        cells[ratio.replace("_", " ")] = _shown(row.get(ratio))
    return cells


def _step_cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    share, lora = row.get("matmul_share"), _lora_beside(row, rows)
    return {
        "step (ms)": _shown(row.get("step_seconds"), MILLI),
        "step over LoRA's": _over(row, lora, "step_seconds"),
        "peak over LoRA's": _over(row, lora, "measured_allocated_bytes"),
        "tokens/s": _shown(row.get("tokens_per_second")),
        "of the matrix product": _shown(share, 0.01) + (" %" if share is not None else ""),
        "power (W)": _shown(row.get("power_watts")),
    }


def _lora_beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns LoRA's row in the same setting, of the same rank and targets; full fine-tuning has none of these."""
    same = ["model", "batch_size", "seq_len", "checkpointing", "optimizer"]
    same += ["rank", "targets"] if row["method"] != "full" else []
    found = (other for other in rows if other["method"] == "lora" and all(other[key] == row[key] for key in same))
    return next(found, {})


def _over(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    return f"{row[key] / other[key]:.3f}" if row.get(key) is not None and other.get(key) else "-"


def _outcome(row: dict[str, Any]) -> str:
    text = str(row["status"])
    if "fits" in row:
        text = "fits" if row["fits"] else f"does not fit ({text})"
    others = row.get("other_processes")
    return text + (f", with {others} other processes on the card" if others else "")


def _spoken_bytes(size: int | None) -> str:
    return "-" if size is None else spoken_bytes(size)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f} %"


def _shown(value: Any, unit: float = 1) -> str:
    """Returns a number in a unit, with four digits."""
    return "-" if value is None else f"{value / unit:,.4g}"
