"""Reads the answers that a study's runs generated: how far scores, and single answers, change with the seed."""

from __future__ import annotations

import math
from itertools import combinations

import pandas as pd
from scipy.stats import chi2

from peftscope.analysis.exact_match import ACCURACY, exact_match
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.claims.measurement import Measurement, NotRunError, over_seeds, runs_of
from peftscope.layout import run_folder
from peftscope.planning.published import ITEMS


def spread_of_scores(study: str, arms: list[str]) -> Measurement:
    """Returns the standard deviation of exact match between the seeds of one arm, pooled over arms, in points.

    All runs answer the same items. The interval is that of a variance of normal values.
    """
    results = StudyResults(study)
    scores = {arm: 100 * exact_match(results, arm)[ACCURACY].dropna() for arm in arms}
    freedom = sum(len(each) - 1 for each in scores.values())
    if freedom <= 0:
        raise NotRunError(f"the study `{study}` has no scores of several seeds")
    squares = sum(float(each.var() * (len(each) - 1)) for each in scores.values())
    shares = ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2)
    low, high = (math.sqrt(squares / chi2.ppf(share, freedom)) for share in shares)
    evidence = {f"spread of {arm}": float(each.std()) for arm, each in scores.items()}
    runs, found = runs_of(results, *arms), math.sqrt(squares / freedom)
    return Measurement(found, low, high, freedom, evidence=evidence, model=results.subject, run_ids=runs)


def share_that_change(study: str, arms: list[str]) -> Measurement:
    """Returns the share of items whose answers differ between two seeds of one arm, mean over arms; one value a seed.

    The value of a seed is the mean over its pairs with all other seeds.
    """
    results = StudyResults(study)
    texts, marks = {}, {}
    for arm in arms:
        runs = results.arm_runs(arm)
        rows = _answers(results, runs)
        texts[arm] = rows.pivot_table("answer", "item", "seed", aggfunc="first")
        marks[arm] = rows.pivot_table("correct", "item", "seed")
    changes = pd.concat([_differing(table).stack() for table in texts.values()], axis="columns").mean(axis="columns")
    by_seed = changes.groupby(level=0).mean()
    evidence = {f"answers that differ, {arm}": float(_differing(table).stack().mean()) for arm, table in texts.items()}
    for arm, table in marks.items():
        evidence[f"right in one and wrong in the other, {arm}"] = float(_differing(table).stack().mean())
    evidence["items"] = min(len(table) for table in texts.values())
    return over_seeds(results, by_seed, evidence, runs_of(results, *arms))


def _differing(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the share of rows in which two columns differ, for each pair of columns in both orders."""
    found = pd.DataFrame(math.nan, index=table.columns, columns=table.columns.rename("other"))
    for one, other in combinations(table.columns, 2):
        found.loc[one, other] = found.loc[other, one] = float((table[one] != table[other]).mean())
    return found


def _answers(results: StudyResults, runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the items that runs answered, each with the answer, whether it is right, and the seed of its run."""
    path = results.folder / ITEMS
    if path.is_file():
        items = pd.read_parquet(path, columns=["run_id", "item", "answer", "correct"])
    else:
        files = {run: run_folder(run) / "items.jsonl" for run in runs["run_id"]}
        items = pd.concat(pd.read_json(file, lines=True).assign(run_id=run) for run, file in files.items())
    seeds = items["run_id"].map(runs.set_index("run_id")["seed"])
    return items.assign(seed=seeds).dropna(subset=["seed", "answer", "correct"])
