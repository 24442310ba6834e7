"""Reads how many answers the arms of a study give exactly, or another score of runs that is a share. No torch."""

from __future__ import annotations

import math

import pandas as pd

from peftscope.analysis.beside_loss import beside_loss
from peftscope.analysis.collect import paired
from peftscope.analysis.study import StudyResults

ACCURACY, GREEDY, ARGMAX = "exact_match_fraction", "greedy_match_fraction", "token_accuracy_fraction"
"""Columns of runs: exact match of the answers that were generated, and of the whole test split; see ``RunRecord``."""


def exact_match(study: StudyResults, arm: str, column: str = ACCURACY) -> pd.DataFrame:
    """Returns the runs of an arm, with the score of the untouched base for those that diverged."""
    return _scored(study, study.arm_runs(arm), column)


def _scored(study: StudyResults, runs: pd.DataFrame, column: str) -> pd.DataFrame:
    if column not in runs or runs[column].isna().all():
        return runs.assign(**{column: math.nan})
    of_base = study.base_runs[column].dropna()
    scores = runs[column].mask(runs["status"] == "diverged", of_base.iloc[0] if len(of_base) else 0.0)
    return runs.assign(**{column: scores})


def has_whole_split(study: StudyResults, *arms: str) -> bool:
    """Returns whether some arms were judged on the exact match of the whole test split."""
    return all(exact_match(study, arm, GREEDY)[GREEDY].notna().any() for arm in arms)


def points(study: StudyResults, arm: str, against: str, column: str = "") -> list[float]:
    """Returns how many more points of exact match, or of another score, an arm has than another; see ``beside_loss``.

    It is that of the whole test split if both were judged on it, and otherwise of the answers that were generated.
    """
    column = column or (GREEDY if has_whole_split(study, arm, against) else ACCURACY)

    def scores(mine: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
        return 100 * paired(_scored(study, mine, column), _scored(study, other, column), column)

    return beside_loss(study, arm, against, scores)
