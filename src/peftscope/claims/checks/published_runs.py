"""Quantities of runs that others have published, as they stand in the ledger."""

from __future__ import annotations

from peftscope.claims.measurement import Measurement


def methods_that_dominate(runs: dict[str, tuple[float, float]], run: str) -> Measurement:
    """Returns how many of some runs take less memory than one of them and score higher, so that it is dominated.

    Args:
        runs: The memory and the score of each run, the score being the better the higher it is.
        run: The run that is asked about.
    """
    size, score = runs[run]
    better = {name: other for name, other in runs.items() if other[0] < size and other[1] > score}
    evidence: dict[str, float | str] = {"runs": len(runs), "memory": size, "score": score}
    if better:
        best = max(better, key=lambda name: better[name][1])
        evidence |= {"best of them": best, "its memory": better[best][0], "its score": better[best][1]}
    return Measurement(len(better), n=len(runs), evidence=evidence)
