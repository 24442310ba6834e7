"""How often a study's rule says something wrong: simulated comparisons of two arms, the choice of rates included.

``python -m benchmarks.error_rates`` writes ``results/published/error-rates.csv`` and the table of docs/error-rates.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.page import write_blocks
from peftscope.analysis.compare import compare, pair_values
from peftscope.analysis.stats import trimmed_mean
from peftscope.layout import PUBLISHED_RESULTS
from peftscope.planning.experiment import STEP
from peftscope.planning.sweep import ROUNDS

TASK_GAIN, LOSS = 0.92, 0.19
"""Measured for LoRA of rank 8 on two-digit sums after 160 steps, in nats per token: the yardstick and the loss."""
SPREAD, OF_BATCHES = 0.015, 0.3
"""The standard deviation of single runs in nats per token, and the share of its variance that arms have in common."""
CURVATURE = 0.35
"""How much the log of the loss rises with the square of the log of the rate: by half at three times the best rate."""
COARSE_STEP = 3.0
PUBLISHED, PAGE = PUBLISHED_RESULTS / "error-rates.csv", Path("docs/error-rates.md")


@dataclass(frozen=True)
class Setting:
    """A world to simulate studies in.

    Attributes:
        pairs: The seeds of each arm.
        rises: How far above its best rate, as a factor, each arm's steep rise begins. From there on a tenth of
            the runs, and half of all more with each ``STEP``, end with more than twice the loss on average.
        tunings: How many times the second arm was tuned, as a reference is that counts with its A/A.
    """

    pairs: int
    rises: tuple[float, float]
    tunings: int = 1


@dataclass(frozen=True)
class _Arm:
    """An arm whose rates are counted from its best one; the loss there is ``LOSS`` without its noise."""

    rise: float
    coarse: float

    def losses(self, rate: float, common: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns the loss of each seed at a rate."""
        level = LOSS * math.exp(CURVATURE * math.log(rate) ** 2)
        own = random.normal(0, SPREAD * math.sqrt(1 - OF_BATCHES), len(common))
        steep = random.random(len(common)) < _on_the_rise(rate / self.rise)
        return level + common + own + steep * random.exponential(1.2 * LOSS, len(common))

    def estimate(self, common: np.ndarray, random: np.random.Generator) -> list[list[float]]:
        """Returns the losses by seed for each of the rates at which the rule lets the arm run."""
        coarse = [self.coarse * COARSE_STEP**k for k in (-2, -1, 0, 1, 2)]
        tried = [float(self.losses(rate, np.zeros(1), random)[0]) for rate in coarse]
        centre = coarse[int(np.argmin(tried))]
        runs = {k: self.losses(centre * STEP**k, common, random) for k in (-1, 0, 1)}
        for _ in range(ROUNDS - 1):
            means = {k: trimmed_mean(list(losses)) for k, losses in runs.items()}
            best = min(means, key=lambda k: means[k])
            if best in (beyond := {min(runs): min(runs) - 1, max(runs): max(runs) + 1}):
                runs[beyond[best]] = self.losses(centre * STEP ** beyond[best], common, random)
        return [list(losses) for losses in runs.values()]


def _on_the_rise(over: float) -> float:
    """Returns the share of runs that end on the steep rise, at a rate over that where it begins."""
    return 0.0 if over < 1 else min(1.0, 0.1 + 0.5 * math.log(over) / math.log(STEP))


def estimates(setting: Setting, draws: int) -> pd.DataFrame:
    """Returns one row for each simulated comparison of two arms that are equally good: in % of the task gain.

    The columns are the difference, its 95 % half-width, and the bound within which the two are said to be the same.
    """
    random = np.random.default_rng(0)
    rows = []
    for _ in range(draws):
        common = random.normal(0, SPREAD * math.sqrt(OF_BATCHES), setting.pairs)
        rises = (setting.rises[0], *setting.tunings * [setting.rises[1]])
        coarse = np.exp(random.uniform(-0.5, 0.5, len(rises)) * math.log(COARSE_STEP))
        first, *second = (_Arm(rise, start).estimate(common, random) for rise, start in zip(rises, coarse, strict=True))
        found = compare([100 * value / TASK_GAIN for value in pair_values([first], second)], math.inf)
        rows.append({"difference": found.mean, "half_width": found.half_width(), "bound": found.bound})
    return pd.DataFrame(rows)


def error_rates(settings: list[Setting], draws: int) -> pd.DataFrame:
    """Returns one row per setting: bias, standard deviation and coverage, the half-width and the bound."""
    rows = []
    for setting in settings:
        found = estimates(setting, draws)
        covered = (found["difference"].abs() <= found["half_width"]).mean()
        rows.append(
            {
                **asdict(setting),
                "draws": draws,
                "bias": found["difference"].mean(),
                "standard deviation": found["difference"].std(),
                "coverage": covered,
                "half-width": found["half_width"].median(),
                "bound": found["bound"].median(),
            }
        )
    return pd.DataFrame(rows)


SETTINGS = [Setting(pairs, rises) for pairs in (5, 8) for rises in ((3.0, 3.0), (1.5, 1.5), (1.2, 3.0), (1.0, 3.0))]
SETTINGS += [Setting(pairs, (3.0, 3.0), tunings=2) for pairs in (5, 8)]


def rendered(table: pd.DataFrame) -> str:
    """Returns the table of the page as Markdown."""
    head = ["seeds", "the rises begin at", "bias (%)", "standard deviation (%)", "coverage (%)", "half-width (%)"]
    head.append("said to be within (%)")
    lines = ["| " + " | ".join(head) + " |", "|---:" * len(head) + "|"]
    for row in table.to_dict("records"):
        rises = " and ".join(f"{float(rise):g}" for rise in re.findall(r"[\d.]+", str(row["rises"])))
        numbers = [row["bias"], row["standard deviation"], 100 * row["coverage"], row["half-width"], row["bound"]]
        told = [f"{number:.{digits}f}" for number, digits in zip(numbers, (2, 2, 1, 2, 2), strict=True)]
        rises += ", the second tuned twice" * (row["tunings"] == 2)
        lines.append("| " + " | ".join([str(row["pairs"]), rises, *told]) + " |")
    draws = int(table["draws"].iloc[0])
    error = 100 * math.sqrt(0.05 * 0.95 / draws)
    return "\n".join(
        [*lines, "", f"{draws:,} comparisons a line; the standard error of coverage is {error:.1f} points."]
    )


def main() -> None:
    """Writes the error rates of all settings, and the page."""
    error_rates(SETTINGS, draws=4000).to_csv(PUBLISHED, index=False, float_format="%.4f")
    write_blocks({"error-rates": rendered(pd.read_csv(PUBLISHED))}, PAGE)
    print(PUBLISHED)


if __name__ == "__main__":
    main()
