"""What a report contains: one list for the Snakefile, ``peftscope report``, the page and the findings. No torch.

The functions are named and not imported here: the Snakefile loads this list, and what draws takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from peftscope.analysis.weights import weights_path
from peftscope.layout import results_folder
from peftscope.planning.plan import Plan


@dataclass(frozen=True)
class Part:
    """What one function writes into an experiment's folders of tables and figures.

    Attributes:
        writer: The function, as ``MODULE.NAME`` of this room. It takes the experiment.
        captions: What Snakemake's report says of each table and figure, by the name of the file without its ending.
        belongs: Returns whether the report of an experiment has it.
        of_study: Whether it needs a finished study.
        sentence: The function that says what the part's figure shows, where that is an answer; as ``MODULE.NAME``. It
            takes the experiment.
    """

    writer: str
    captions: dict[str, str]
    belongs: Callable[[Plan], object] = lambda plan: True
    of_study: bool = False
    sentence: str = ""

    def write(self, experiment: str) -> None:
        """Writes the tables and figures of an experiment."""
        function_of(self.writer)(experiment)


def function_of(name: str) -> Callable[..., Any]:
    """Returns a function of this room by its name, ``MODULE.NAME``."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"{__package__}.{module}"), function)


FIGURES = Part(
    "plots.write_figures",
    {
        "pareto": "Held-out loss against the peak of live tensors in training. Lower and further left is better.",
        "memory": "Peak of live tensors while loading and initialising, training, and evaluating.",
        "throughput": "Tokens per second at the median step, without padding. Each point is a run.",
        "losses": "Training loss by step.",
        "prediction": (
            "Measured peaks against those that the simulator predicted from shapes alone. On the line they are equal."
        ),
    },
)
"""The figures that every report has. Their function also draws the ladders."""
LADDER = "The loss that runs are judged by along one factor, with everything else at the centre of the ladder."
_DIFFERENCES = (
    "How far each arm is ahead of the reference arm in held-out loss, seed by seed, with the interval of the mean; "
    "further right is better. Dashed lines are the margin of sameness, the grey band is what the reference arm differs "
    "by from itself, where the study measured it."
)
PARTS = (
    Part(
        "tables.write_tables",
        {
            "methods": "One row per method: scores with intervals over seeds, memory peaks and speed as medians.",
            "runs": "Every run, and how it ended. A run on too small a card ends as OOM.",
            "predictions": (
                "The absolute error of predicted peaks in percent: the mean and the worst over the runs of each method."
            ),
        },
    ),
    Part(
        "benchmarks.write_benchmarks",
        {"benchmarks": "Scores of lm-eval's own benchmarks after training, beside those of the untouched base."},
    ),
    FIGURES,
    Part(
        "study.write_study",
        {
            "differences": _DIFFERENCES,
            "contrasts": _DIFFERENCES,
            "controls": (
                "The controls of the study: an arm against itself (A/A), at a learning rate of zero, and on shuffled "
                "answers."
            ),
            "tuning": (
                "Validation loss of each arm of the study at every learning rate of its list. Rings mark the chosen "
                "rates."
            ),
        },
        belongs=lambda plan: plan.is_study,
        of_study=True,
    ),
    Part(
        "capacity.write_capacity",
        {
            "capacity": (
                "Bits of random strings that runs stored, over the bits that they were given. Diamonds are the breaks "
                "beyond which more is given and no more is stored, with their intervals."
            )
        },
        belongs=lambda plan: plan.measures_capacity,
    ),
    Part(
        "shares.write_shares",
        {
            "shares": (
                "What each rank, alpha or dimension keeps of what full fine-tuning gains on the task, at its own best "
                "learning rate, with the loss on the right and the rate beneath. In a study without full fine-tuning "
                "the reference takes its place."
            )
        },
        belongs=lambda plan: plan.varied,
        of_study=True,
        sentence="shares.shares_sentence",
    ),
    Part(
        "weights.write_updates",
        {
            "updates": (
                "Share of the energy of a matrix's update that its largest singular values hold, the median over "
                "matrices and seeds. Dotted lines are noise of the same shapes. Of a method that chooses its ranks: "
                "the rank that each matrix kept, over what its update is worth."
            )
        },
        belongs=lambda plan: weights_path(results_folder(plan.name)).is_file(),
        sentence="weights.updates_sentence",
    ),
    Part(
        "forgetting.write_forgetting",
        {
            "forgetting": (
                "Code length of English prose against the loss on the task, along the training. Each line is the mean "
                "of an arm's seeds."
            )
        },
        belongs=lambda plan: plan.follows_prose,
        of_study=True,
        sentence="forgetting.forgetting_sentence",
    ),
    Part(
        "overfitting.write_overfitting",
        {
            "overfitting": (
                "The loss on validation items along the training, and beneath it the loss on the examples that are "
                "trained, by arm."
            )
        },
        belongs=lambda plan: plan.limits_examples,
        of_study=True,
        sentence="overfitting.overfitting_sentence",
    ),
)
CAPTIONS = {name: caption for part in PARTS for name, caption in part.captions.items()} | {"ladder": LADDER}
"""The captions by the names of tables and figures; that of ``ladder-FIELD`` is at ``ladder``."""
