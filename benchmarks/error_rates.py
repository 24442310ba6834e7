"""How often the whole rule of a study says something wrong: simulated studies, tuning included.

``python -m benchmarks.error_rates`` writes ``results/published/error-rates.csv`` and the table of docs/studies.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from peftscope.analysis.compare import compare
from peftscope.analysis.study import MARGIN
from peftscope.analysis.tuning import fit_rate
from peftscope.layout import PUBLISHED_RESULTS
from peftscope.planning.cells import rounded
from peftscope.planning.experiment import FINE_STEP

TASK_GAIN, LOSS, SPREAD = 0.92, 0.19, 0.013
"""Measured for LoRA of rank 8 on two-digit sums after 160 steps, in nats per token: the yardstick, the loss, and the
standard deviation of single runs that differ in their seed."""
CURVATURE = 0.35
"""How much the log of the loss rises with the square of the log of the rate: by half at three times the best rate."""
COARSE_STEP = 3.0
PUBLISHED, PAGE = PUBLISHED_RESULTS / "error-rates.csv", Path("docs/studies.md")


@dataclass(frozen=True)
class Setting:
    """A world to simulate studies in.

    Attributes:
        difference: The true difference of two arms at their best rates, as a share of the margin.
        tuned: Whether the rates are chosen by the study's two stages, or known.
        pairs: The number of pairs.
        spread: The standard deviation of single runs, in nats per token.
    """

    difference: float
    tuned: bool
    pairs: int = 8
    spread: float = SPREAD


def outcomes(setting: Setting, draws: int, seed: int = 0) -> list[str]:
    """Returns the outcome of each of so many simulated comparisons."""
    random = np.random.default_rng(seed)
    margin = MARGIN * TASK_GAIN
    results = []
    for _ in range(draws):
        # Both arms as they would be at their best rates, then as they are at the rates that the study chooses.
        levels = (LOSS + setting.difference * margin, LOSS)
        arms = [_tuned(level, setting.spread, random) if setting.tuned else (level, 0.0) for level in levels]
        runs = [random.normal(loss, setting.spread, setting.pairs) for loss, _ in arms]
        error = math.hypot(*(regret for _, regret in arms))
        results.append(compare(list(runs[0] - runs[1]), margin, error).outcome)
    return results


def _tuned(level: float, spread: float, random: np.random.Generator) -> tuple[float, float]:
    """Returns an arm's true loss at the rate that two stages choose, and the regret that its fit tells."""
    best = math.exp(random.uniform(-math.log(COARSE_STEP) / 2, math.log(COARSE_STEP) / 2))

    def true(rate: float) -> float:
        return level * math.exp(CURVATURE * math.log(rate / best) ** 2)

    def trials(rates: list[float], fine: bool) -> list[tuple[float, float, bool]]:
        return [(rate, max(1e-3, random.normal(true(rate), spread)), fine) for rate in rates]

    coarse = trials([COARSE_STEP**k for k in (-2, -1, 0, 1, 2)], False)
    centre = min(coarse, key=lambda trial: trial[1])[0]
    fine = trials([rounded(centre * factor) for factor in (1 / FINE_STEP, 1, FINE_STEP)], True)
    fit = fit_rate(coarse + fine, centre)
    assert fit is not None
    return true(fit.learning_rate), fit.regret_rms


def error_rates(settings: list[Setting], draws: int) -> pd.DataFrame:
    """Returns one row per setting: the share of comparisons called same, different, more different, and open."""
    rows = []
    for setting in settings:
        said = pd.Series(outcomes(setting, draws))
        rows.append(
            {
                **asdict(setting),
                "draws": draws,
                "same": said.str.startswith("same").mean(),
                "differs": (said.str.contains("differs")).mean(),
                "beyond the margin": (said == "differs by more than the margin").mean(),
                "open": (said == "open").mean(),
                "standard error": math.sqrt(0.05 * 0.95 / draws),
            }
        )
    return pd.DataFrame(rows)


SETTINGS = [
    Setting(difference, tuned, pairs, spread)
    for pairs, spread in ((8, SPREAD), (8, 0.03), (16, 0.03))
    for tuned in (False, True)
    for difference in (0.0, 0.5, 1.0, 2.0)
]


def rendered(table: pd.DataFrame) -> str:
    """Returns the table of the page as Markdown."""
    names = ["same", "differs", "beyond the margin", "open"]
    head = ["pairs", "spread (nats)", "rates", "true difference", *names]
    lines = ["| " + " | ".join(head) + " |", "|---:" * len(head) + "|"]
    for row in table.to_dict("records"):
        rates = "tuned" if row["tuned"] else "known"
        setting = [str(row["pairs"]), f"{row['spread']:g}", rates, f"{row['difference']:g}"]
        lines.append("| " + " | ".join([*setting, *(f"{100 * row[name]:.1f}" for name in names)]) + " |")
    draws, error = table["draws"].iloc[0], 100 * table["standard error"].iloc[0]
    return "\n".join([*lines, "", f"{draws:,} studies a line; at 5 % the standard error is {error:.1f} points."])


def with_table(page: str, table: pd.DataFrame) -> str:
    """Returns the page with the table between its marks."""
    return re.sub(r"(<!-- error rates: .* -->\n).*(<!-- end -->)", rf"\1{rendered(table)}\n\2", page, flags=re.DOTALL)


def main() -> None:
    """Writes the error rates of all settings, and the page."""
    error_rates(SETTINGS, draws=4000).to_csv(PUBLISHED, index=False, float_format="%.4f")
    PAGE.write_text(with_table(PAGE.read_text(), pd.read_csv(PUBLISHED)))
    print(PUBLISHED)


if __name__ == "__main__":
    main()
