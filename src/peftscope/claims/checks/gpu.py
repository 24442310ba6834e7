"""Reads and compares rows of ``make gpu-check``. Nothing is measured here, and rows of a CPU never count.

A run is given by the options of ``peftscope memory``, as in ``peftscope.gpu.jobs``. If several cards measured it, the
most extreme value counts, and the evidence shows the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from peftscope.analysis.cards import PUBLISHED, Card, label_of, read_cards
from peftscope.analysis.stats import median_ratio_interval
from peftscope.claims.measurement import Measurement, NotRunError, Quantity

GB, GIB = 10**9, 2**30
MODEL = "llama-2-7b"

Run = dict[str, Any]
Extreme = Literal["smallest", "largest"]


@dataclass(frozen=True)
class _Found:
    """The quantity of one card in one setting, with its interval if it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def fits(
    card: str, runs: list[Run], model: str = MODEL, headroom: float = 0, results: str | Path = PUBLISHED
) -> Measurement:
    """Returns whether any of the runs fits into the memory of a card, on whichever card that was tried.

    Args:
        card: The card to whose memory the runs were limited, from ``peftscope.hardware.cards.GPUS``.
        runs: The options of each run. The answer is no only if all were tried.
        model: The base model.
        headroom: The share of the card that stays free.
        results: The folder of results.
    """
    labels = [label_of(model, run, card, headroom) for run in runs]
    answers: dict[str, bool] = {}
    evidence: dict[str, Quantity] = {}
    for tried in _cards(results):
        rows = {label: row for label in labels if (row := tried.find("fits", label)) is not None}
        fit = any(row["fits"] for row in rows.values())
        if not rows or (not fit and len(rows) < len(labels)):
            continue
        answers[tried.name] = fit
        for label, row in rows.items():
            peak = row.get("measured_device_bytes") or row.get("measured_reserved_bytes")
            evidence[f"{label}, {tried.name}, GiB"] = peak / GIB if peak else row["status"]
            evidence["of the card, GiB"] = row["capacity_bytes"] / GIB
    if not answers:
        raise _missing(labels, results)
    return Measurement(all(answers.values()), evidence=evidence, n=len(answers), model=_on(model, answers))


def peak(run: Run, model: str = MODEL, results: str | Path = PUBLISHED) -> Measurement:
    """Returns the peak of tensors in a training step, in GB."""
    return _extreme([run], lambda row: row["measured_allocated_bytes"] / GB, "largest", model, results)


def activations(run: Run, model: str = MODEL, results: str | Path = PUBLISHED) -> Measurement:
    """Returns the GB of a training step's peak beyond the memory that is in use between two steps.

    With few trained parameters, these are activations, logits and temporaries.
    """

    def beyond(row: Mapping[str, Any]) -> float:
        return float(row["measured_allocated_bytes"] - row["resident_bytes"]) / GB

    return _extreme([run], beyond, "largest", model, results)


def peak_ratio(
    run: Run,
    against: Run,
    batch_sizes: tuple[int, ...] = (1,),
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: str | Path = PUBLISHED,
) -> Measurement:
    """Returns the ratio of the peaks of two runs at the batch size where it is most extreme.

    Args:
        run: The options of the numerator's run.
        against: The options of the denominator's run.
        batch_sizes: The batch sizes. If a run ran out of memory, there is no ratio, and the evidence says so.
        extreme: Whether the smallest or the largest ratio counts.
        model: The base model.
        results: The folder of results.
    """

    def ratio(above: Mapping[str, Any], below: Mapping[str, Any]) -> tuple[float, None, None]:
        return above["measured_allocated_bytes"] / below["measured_allocated_bytes"], None, None

    return _compare(run, against, batch_sizes, ratio, extreme, model, results)


def step_ratio(
    run: Run,
    against: Run,
    batch_sizes: tuple[int, ...] = (1,),
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: str | Path = PUBLISHED,
) -> Measurement:
    """Returns the ratio of two runs' median step times with its interval. Arguments are those of ``peak_ratio``."""

    def ratio(above: Mapping[str, Any], below: Mapping[str, Any]) -> tuple[float, float, float]:
        return median_ratio_interval(above["samples"]["step"], below["samples"]["step"])

    return _compare(run, against, batch_sizes, ratio, extreme, model, results)


def best_speed_ratio(
    run: Run, against: Run, batch_sizes: tuple[int, ...], model: str = MODEL, results: str | Path = PUBLISHED
) -> Measurement:
    """Returns the ratio of two runs' tokens per second, each at its fastest batch size, with its interval.

    If several cards measured both, the smallest ratio counts.
    """
    ratios: list[_Found] = []
    evidence: dict[str, Quantity] = {}
    for card in _cards(results):
        best: list[Mapping[str, Any]] = []
        for options in (run, against):
            rows = {size: card.find("steps", label_of(model, options | {"batch_size": size})) for size in batch_sizes}
            if any(row is None for row in rows.values()):
                break
            ok = [{**row, "size": size} for size, row in rows.items() if row and row["status"] == "ok"]
            best += [max(ok, key=lambda row: row["tokens_per_second"])] if ok else []
        if len(best) == 2:
            ratio = best[0]["tokens_per_second"] / best[1]["tokens_per_second"]
            times, *bounds = median_ratio_interval(best[1]["samples"]["step"], best[0]["samples"]["step"])
            ratios.append(_Found(card.name, ratio, *(ratio * bound / times for bound in bounds)))
            for row, options in zip(best, (run, against), strict=True):
                name = f"{card.name}, {options['method']}, batch {row['size']}, tokens a second"
                evidence[name] = row["tokens_per_second"]
    if not ratios:
        raise _missing(
            [label_of(model, options | {"batch_size": size}) for options in (run, against) for size in batch_sizes],
            results,
        )
    return _of(ratios, "smallest", evidence, model, {found.name for found in ratios})


def smallest_increase(runs: list[Run], model: str = MODEL, results: str | Path = PUBLISHED) -> Measurement:
    """Returns the smallest increase of the peak, in GB, from one run of a list to the next."""
    labels = [label_of(model, run) for run in runs]
    increases: list[_Found] = []
    evidence: dict[str, Quantity] = {}
    for card in _cards(results):
        rows = [row for label in labels if (row := card.find("steps", label)) is not None and row["status"] == "ok"]
        if len(rows) < len(labels):
            continue
        peaks = [row["measured_allocated_bytes"] / GB for row in rows]
        evidence |= {f"{label}, {card.name}, GB": size for label, size in zip(labels, peaks, strict=True)}
        increases.append(_Found(card.name, min(after - before for before, after in pairwise(peaks))))
    if not increases:
        raise _missing(labels, results)
    return _of(increases, "smallest", evidence, model, {found.name for found in increases})


def latency_ratio(
    run: Run,
    state: Literal["base", "apart", "merged"],
    over: Literal["base", "apart", "merged"],
    passes: tuple[Literal["prompt", "token"], ...],
    batch_sizes: tuple[int, ...],
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: str | Path = PUBLISHED,
) -> Measurement:
    """Returns the ratio of two median latencies with its interval, in the setting where it is most extreme.

    Args:
        run: The options of the adapter.
        state: The numerator: the base alone, the adapter apart, or merged.
        over: The denominator.
        passes: A whole prompt, or one further token.
        batch_sizes: The numbers of prompts at once.
        extreme: Whether the smallest or the largest ratio counts.
        model: The base model.
        results: The folder of results.
    """
    labels = [label_of(model, run | {"batch_size": size}) for size in batch_sizes]
    ratios: list[_Found] = []
    names = set()
    for card in _cards(results):
        rows = [card.find("latency", label) for label in labels]
        if any(row is None or row["status"] != "ok" for row in rows):
            continue
        names.add(card.name)
        for size, row in zip(batch_sizes, rows, strict=True):
            assert row is not None
            for name in passes:
                above, below = (row["samples"][which][name] for which in (state, over))
                setting = f"{card.name}, {name}, batch {size}"
                ratios.append(_Found(setting, *median_ratio_interval(above, below)))
    if not ratios:
        raise _missing(labels, results)
    return _of(ratios, extreme, {}, model, names)


def _extreme(
    runs: list[Run], value: Callable[[Mapping[str, Any]], float], extreme: Extreme, model: str, results: str | Path
) -> Measurement:
    labels = [label_of(model, run) for run in runs]
    found: list[_Found] = []
    for card in _cards(results):
        rows = [card.find("steps", label) for label in labels]
        found += [_Found(card.name, value(row)) for row in rows if row is not None and row["status"] == "ok"]
    if not found:
        raise _missing(labels, results)
    return _of(found, extreme, {}, model, {item.name for item in found})


def _compare(
    run: Run,
    against: Run,
    batch_sizes: tuple[int, ...],
    ratio: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float, float | None, float | None]],
    extreme: Extreme,
    model: str,
    results: str | Path,
) -> Measurement:
    """Returns the most extreme ratio of two runs over batch sizes and cards. A card counts if it tried all of them."""
    labels = {
        size: [label_of(model, options | {"batch_size": size}) for options in (run, against)] for size in batch_sizes
    }
    ratios: list[_Found] = []
    evidence: dict[str, Quantity] = {}
    names = set()
    for card in _cards(results):
        rows = {size: [card.find("steps", label) for label in pair] for size, pair in labels.items()}
        if any(row is None for pair in rows.values() for row in pair):
            continue
        for size, (above, below) in rows.items():
            assert above is not None
            assert below is not None
            setting = f"{card.name}, batch {size}"
            if above["status"] == below["status"] == "ok":
                ratios.append(_Found(setting, *ratio(above, below)))
                names.add(card.name)
            else:
                evidence[setting] = "out of memory"
    if not ratios:
        raise _missing([label for pair in labels.values() for label in pair], results)
    return _of(ratios, extreme, evidence, model, names)


def _of(
    quantities: list[_Found], extreme: Extreme, evidence: dict[str, Quantity], model: str, cards: set[str]
) -> Measurement:
    chosen = (min if extreme == "smallest" else max)(quantities, key=lambda item: item.value)
    shown = {item.name: item.value for item in quantities} if len(quantities) > 1 else {}
    return Measurement(
        chosen.value,
        low=chosen.low,
        high=chosen.high,
        evidence={**shown, **evidence},
        n=len(cards),
        model=_on(model, cards),
    )


def _cards(results: str | Path) -> list[Card]:
    cards = read_cards(Path(results))
    if not cards:
        raise NotRunError(f"no card's results under {results}; run make gpu-check on a machine with a CUDA card")
    return cards


def _missing(labels: list[str], results: str | Path) -> NotRunError:
    return NotRunError(f"no card under {results} has measured {', '.join(dict.fromkeys(labels))}")


def _on(model: str, cards: Any) -> str:
    return f"random weights of {model}'s shape on {', '.join(sorted(cards))}"
