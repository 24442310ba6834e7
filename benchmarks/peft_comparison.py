"""How many orderings of PEFT's published method comparison could be chance: ``make peft-comparison``.

Writes the tables of ``docs/peft-comparison.md``, their figures and a number of the README, from
``peft_method_comparison.csv``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special
from scipy.spatial.distance import squareform

from benchmarks.page import write_blocks
from peftscope.analysis.compare import Difference
from peftscope.analysis.stats import CONFIDENCE, holm
from peftscope.report.front import README, with_numbers
from peftscope.report.plots import new_figure
from peftscope.report.tables import markdown

SCORES = Path("benchmarks/peft_method_comparison.csv")
PAGE = Path("docs/peft-comparison.md")
FIGURE = Path("results/published/peft-comparison/ranking.png")
TEST_ITEMS, VALIDATION_ITEMS = 1319, 50
"""The items behind a test accuracy, those of GSM8K's test split, and behind a validation accuracy."""
STATED_SPREADS = (0.0, 0.005, 0.01, 0.02)
"""The standard deviations of single runs between seeds that are shown, because one seed cannot say its own."""
BASELINE = "FULL"
"""Full fine-tuning, which gets no stars in PEFT's shop."""
DRAWS = 10_000
"""How often the scores of all runs are drawn anew to count stars that change."""
LAST = 5
"""The last evaluations of a training whose changes are shown: at the end of a cosine, little is learned."""
WORKING = 0.3
"""Runs below this test accuracy have hardly learned the task, and their changes are left out."""
TOP = 20
"""The first runs, whose orderings are also counted by themselves."""
SHOWN_SPREAD = 0.01
"""The spread between seeds for which every place is shown."""


@dataclass(frozen=True)
class Ranking:
    """Some systems with one score each, the best one first.

    Attributes:
        systems: Their names.
        scores: Their scores.
        errors: The standard error of each score.
        p: The p of each pair of systems, k × k.
        holm_p: The same after Holm's correction for the number of pairs.
    """

    systems: list[str]
    scores: np.ndarray
    errors: np.ndarray
    p: np.ndarray
    holm_p: np.ndarray

    @property
    def pairs(self) -> int:
        """The number of pairs of systems."""
        return math.comb(len(self.systems), 2)

    def undecided(self, *, corrected: bool) -> int:
        """Returns how many pairs cannot be told from chance, alone or after correction for all pairs."""
        p = (self.holm_p if corrected else self.p)[np.triu_indices(len(self.systems), 1)]
        return int((p >= 1 - CONFIDENCE).sum())

    @property
    def places(self) -> list[tuple[int, int]]:
        """The best and the worst place that each system can have: no place is taken by one that is told apart."""
        k, is_apart = len(self.systems), self.holm_p < 1 - CONFIDENCE
        return [(1 + int(is_apart[i, :i].sum()), k - int(is_apart[i, i + 1 :].sum())) for i in range(k)]

    @property
    def first_group(self) -> int:
        """The last of the first places of which no two can be told apart."""
        is_apart = self.holm_p < 1 - CONFIDENCE
        return next((n for n in range(1, len(is_apart)) if is_apart[:n, n].any()), len(is_apart))


def rank(scores: pd.Series, spread: float, items: int | None = None) -> Ranking:
    """Returns systems in the order of their scores, which are fractions by the system's name.

    Args:
        spread: The standard deviation of single runs between seeds.
        items: The number of items behind a score, if their draw counts: it adds a binomial error.
    """
    ordered = scores.sort_values(ascending=False, kind="stable")
    values = ordered.to_numpy()
    errors = np.sqrt(spread**2 + (values * (1 - values) / items if items else np.zeros(len(values))))
    first, second = np.triu_indices(len(values), 1)
    gaps = np.abs(values[first] - values[second]) / np.maximum(np.hypot(errors[first], errors[second]), 1e-300)
    p = list(2 * special.ndtr(-gaps))
    alone, corrected = (squareform(each) + np.eye(len(values)) for each in (p, holm(p)))
    return Ranking(list(ordered.index), values, errors, alone, corrected)


def trust(ranking: Ranking, draws: int = 4000) -> tuple[float, float, float]:
    """Returns the chances that the first is the best, that a pair is in the right order, and that all are.

    The true scores are drawn from what is known of them: a normal prior with the spread of the systems, and the scores
    that were seen.
    """
    random = np.random.default_rng(0)
    scores, errors = ranking.scores, ranking.errors
    noise = float((errors**2).mean())
    # The floor keeps the order of equal systems random.
    prior = max(float(scores.var(ddof=1)) - noise, 1e-9 * noise)
    weight = prior / (prior + errors**2) if noise else np.ones(len(scores))
    centre, reach = scores.mean() + weight * (scores - scores.mean()), np.sqrt(weight) * errors
    truth = centre[:, None] + reach[:, None] * random.normal(size=(len(scores), draws))
    right = np.zeros(draws)
    for i in range(1, len(scores)):
        right += ((truth[:i] > truth[i]) == (scores[:i] > scores[i])[:, None]).sum(axis=0)
    winner = truth.argmax(axis=0) == scores.argmax()
    return float(winner.mean()), float((right / ranking.pairs).mean()), float((right == ranking.pairs).mean())


def summarise_ranking(ranking: Ranking) -> dict[str, str]:
    """Returns what a ranking says, by column."""
    alone, corrected = (ranking.undecided(corrected=each) for each in (False, True))
    winner, pairs, order = trust(ranking)
    return {
        "could be chance, one by one": f"{alone:,} of {ranking.pairs:,} ({alone / ranking.pairs:.0%})",
        "after Holm": f"{corrected:,} ({corrected / ranking.pairs:.0%})",
        "first group": f"1 to {ranking.first_group}",
        "right winner": f"{winner:.0%}",
        "pairs in order": f"{pairs:.1%}",
        "whole order right": f"{order:.1%}",
    }


def rankings(scores: Path = SCORES) -> dict[tuple[float, int | None], Ranking]:
    """Returns the ranking under each spread of seeds, on the same items (None) and on as many others of their kind."""
    accuracies = pd.read_csv(scores, index_col="name")["test_accuracy"]
    return {
        (spread, items): rank(accuracies, spread, items)
        for items in (None, TEST_ITEMS)
        for spread in STATED_SPREADS
        if spread or items
    }


def wobble(scores: Path = SCORES) -> tuple[int, float, float]:
    """Returns how far accuracy moves between two evaluations of one run late in its training.

    These are the number of runs, the root mean square of the change on the validation items, and the standard deviation
    that a single accuracy on the test items has if each answer changes by itself.
    """
    table = pd.read_csv(scores)
    table = table[table["test_accuracy"] > WORKING]
    curves = np.array([[float(value) for value in text.split()] for text in table["validation_accuracies"]])
    change = math.sqrt(float((np.diff(curves[:, -LAST:]) ** 2).mean()))
    return len(table), change, change * math.sqrt(VALIDATION_ITEMS / TEST_ITEMS / 2)


def render(scores: Path = SCORES) -> str:
    """Returns the tables of the page as Markdown."""
    found = rankings(scores)
    main = found[SHOWN_SPREAD, TEST_ITEMS]
    same = found[SHOWN_SPREAD, None]
    runs, change, single = wobble(scores)
    seeds = Difference(0.02, math.sqrt(2) * SHOWN_SPREAD, 0.0, 2, math.nan).pairs_to_reach(0.02)
    rows = [
        {"items": "others too" if items else "these", "spread of seeds (pp)": f"{100 * spread:g}"}
        | summarise_ranking(ranking)
        for (spread, items), ranking in found.items()
    ]
    alone, corrected = ([_share(one, corrected=each) for one in (same, main)] for each in (False, True))
    beside = int((np.diag(main.p, 1) >= 1 - CONFIDENCE).sum())
    top = [f"{(one.p[:TOP, :TOP][np.triu_indices(TOP, 1)] >= 1 - CONFIDENCE).mean():.0%}" for one in (same, main)]
    lines = [
        f"If single runs spread by {100 * SHOWN_SPREAD:g} pp between seeds, **{alone[0]} of the orderings of two runs "
        f"could be chance on these very items, and {alone[1]} on other items of their kind**. After correction for "
        f"their number it is {corrected[0]} and {corrected[1]}. Among the first {TOP} runs, {top[0]} and {top[1]} "
        f"of the orderings could be chance one by one. On other items, {beside} of {len(main.systems) - 1} neighbours "
        f"cannot be told apart, nor can the first {main.first_group} places.",
        "",
        markdown(pd.DataFrame(rows)).rstrip(),
    ]
    lines += [
        "",
        "## How large the spread may be",
        "",
        f"Between two evaluations of the last {LAST} of a training, the accuracy of one run on {VALIDATION_ITEMS} "
        f"validation items moves by {100 * change:.1f} pp (root mean square over the {runs} runs above "
        f"{100 * WORKING:g} % test accuracy). If each answer changes by itself, a single accuracy on {TEST_ITEMS:,} "
        f"items then has a standard deviation of {100 * single:.1f} pp.",
        "",
        f"To tell a difference of 2 pp from chance at a spread of {100 * SHOWN_SPREAD:g} pp, on the same items, takes "
        f"{seeds} seeds of each.",
        "",
        f"## Every place, at a spread of {100 * SHOWN_SPREAD:g} pp and on other items",
        "",
        "| place | run | test accuracy (%) | standard error (pp) | places it can have |",
        "|---:|---|---:|---:|---:|",
    ]
    for place, (name, (best, worst)) in enumerate(zip(main.systems, main.places, strict=True), 1):
        score, error = 100 * main.scores[place - 1], 100 * main.errors[place - 1]
        lines.append(f"| {place} | {name} | {score:.1f} | {error:.1f} | {best} to {worst} |")
    return "\n".join(lines)


def stars(scores: np.ndarray) -> np.ndarray:
    """Returns the stars of each method, as PEFT's shop gives them: five to the best fifth, and one to the last.

    Methods are in the last axis.
    Source: huggingface/peft at 5d602fdb, method_comparison/peft-shop/app.py, ``star_rating``.
    """
    better = (scores[..., None, :] > scores[..., :, None]).sum(-1)
    return 5 - 5 * better // scores.shape[-1]


def stars_by_chance(spread: float, scores: Path = SCORES) -> pd.DataFrame:
    """Returns for each method its published score and stars, and the share of draws in which it has 1 to 5 stars.

    A method has the score of its best run, as in the shop. A draw moves the score of each run by what its seed does,
    with ``spread`` as its standard deviation.
    """
    table = pd.read_csv(scores)
    table = table[table["peft_type"] != BASELINE].sort_values("peft_type", kind="stable")
    names, first = np.unique(table["peft_type"], return_index=True)
    published = table["test_accuracy"].to_numpy()
    random = np.random.default_rng(0)
    drawn = published + spread * random.standard_normal((DRAWS, len(published)))
    counted = stars(np.maximum.reduceat(drawn, first, axis=1))
    best = np.maximum.reduceat(published, first)
    shares = {str(n): (counted == n).mean(axis=0) for n in range(1, 6)}
    found = pd.DataFrame({"method": names, "score": best, "stars": stars(best), **shares})
    return found.sort_values("score", ascending=False, ignore_index=True)


def render_stars(scores: Path = SCORES) -> str:
    """Returns how many stars would change, as Markdown."""
    lines = [
        "| spread of seeds (pp) | methods whose stars change | by two or more | methods that keep theirs in 95 % |",
        "|---:|---:|---:|---:|",
    ]
    for spread in STATED_SPREADS[1:]:
        found = stars_by_chance(spread, scores)
        shares = found[[str(n) for n in range(1, 6)]].to_numpy()
        apart = np.abs(np.arange(1, 6) - found["stars"].to_numpy()[:, None])
        changed, far = ((shares * (apart >= least)).sum() for least in (1, 2))
        kept = int(((shares * (apart == 0)).sum(axis=1) >= CONFIDENCE).sum())
        lines.append(f"| {100 * spread:g} | {changed:.1f} of {len(found)} | {far:.2f} | {kept} |")
    return "\n".join(lines)


def draw_ranking(ranking: Ranking) -> None:
    """Draws the score of each system with its interval, the best one at the top."""
    k = len(ranking.systems)
    with new_figure(FIGURE, 7.5, 1.2 + 0.2 * k) as axes:
        reach = 100 * 1.96 * ranking.errors
        axes.errorbar(100 * ranking.scores, range(k), xerr=reach, fmt="o", ms=4, capsize=2, color="C0")
        axes.set_yticks(range(k), ranking.systems, fontsize=7)
        axes.set(ylim=(k - 0.5, -0.5), xlabel="score (%)")


def draw_stars() -> None:
    """Draws how often each method would have each number of stars, with its published ones."""
    found = stars_by_chance(SHOWN_SPREAD)
    shares = found[[str(n) for n in range(1, 6)]].to_numpy()
    with new_figure(FIGURE.with_name("stars.png"), 6, 1.2 + 0.2 * len(found)) as axes:
        rows, columns = np.nonzero(shares >= 0.005)
        axes.scatter(columns + 1, rows, s=90 * shares[rows, columns], color="C0")
        axes.scatter(found["stars"], range(len(found)), s=110, facecolors="none", edgecolors="C1")
        names = [f"{row.method.lower()} ({100 * row.score:.1f} %)" for row in found.itertuples()]
        axes.set_yticks(range(len(found)), names, fontsize=7)
        axes.set(xlim=(0.5, 5.5), ylim=(len(found) - 0.5, -0.5), xlabel="stars (area: share of draws, ring: published)")


def number_of_readme(scores: Path = SCORES) -> dict[str, str]:
    """Returns the README's number by its name there: per cent of the orderings that could be chance, on other items."""
    return {"orderings by chance": _share(rankings(scores)[SHOWN_SPREAD, TEST_ITEMS], corrected=False).rstrip("%")}


def _share(ranking: Ranking, *, corrected: bool) -> str:
    return f"{ranking.undecided(corrected=corrected) / ranking.pairs:.0%}"


def main() -> None:
    """Writes the page, its figures, and the number in the README."""
    write_blocks({"tables": render(), "stars": render_stars()}, PAGE)
    README.write_text(with_numbers(README.read_text(), number_of_readme()))
    draw_ranking(rankings()[SHOWN_SPREAD, TEST_ITEMS])
    draw_stars()
    print(PAGE)


if __name__ == "__main__":
    main()
