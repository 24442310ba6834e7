"""Reads how many answers the arms of a study give exactly, or another score of runs that is a share. No torch."""

from __future__ import annotations

import math

import pandas as pd

from peftscope.analysis.collect import paired
from peftscope.analysis.stats import differences
from peftscope.analysis.study import StudyResults

ACCURACY, GREEDY, ARGMAX = "exact_match_fraction", "greedy_match_fraction", "token_accuracy_fraction"
"""Columns of runs: exact match of the answers that were generated, and of the whole test split; see ``RunRecord``."""


def exact_match(study: StudyResults, arm: str, column: str = ACCURACY) -> pd.DataFrame:
    """Returns the runs of an arm, with the score of the untouched base for those that diverged."""
    runs = study.arm_runs(arm)
    if column not in runs or runs[column].isna().all():
        return runs.assign(**{column: math.nan})
    of_base = study.base_runs[column].dropna()
    return runs.fillna({column: of_base.iloc[0] if len(of_base) else 0.0})


def has_whole_split(study: StudyResults, *arms: str) -> bool:
    """Returns whether some arms were judged on the exact match of the whole test split."""
    return all(exact_match(study, arm, GREEDY)[GREEDY].notna().any() for arm in arms)


def exact_matches(study: StudyResults, arm: str, against: str, column: str = "") -> pd.DataFrame:
    """Returns the exact match of two arms in %, or another score, a row for each seed of both; see ``paired``.

    It is that of the whole test split if both were judged on it, and otherwise of the answers that were generated.
    """
    column = column or (GREEDY if has_whole_split(study, arm, against) else ACCURACY)
    return 100 * paired(exact_match(study, arm, column), exact_match(study, against, column), column)


def points(study: StudyResults, arm: str, against: str, column: str = "") -> list[float]:
    """Returns how many more points of exact match, or of another score, an arm has than another, a value a seed."""
    both = exact_matches(study, arm, against, column)
    return differences(list(both["first"]), list(both["second"]), study.has_several_rates(arm, against))
