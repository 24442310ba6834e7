"""How long a run takes on this machine: on its card by the time model, on its processor by that and by records."""

from __future__ import annotations

from functools import cache

from peftscope.hardware.cards import Gpu, Rates, measured_card
from peftscope.hardware.device import cards
from peftscope.models.catalog import find_model
from peftscope.planning.demands import host_bytes
from peftscope.planning.estimate import estimate_seconds
from peftscope.planning.forecast import Forecast, Forecaster
from peftscope.spec import RunSpec


def run_seconds(spec: RunSpec, *, one_thread: bool = False) -> float:
    """Returns the seconds that a run will take on this machine, to within a factor of about 1.5.

    ``one_thread``: the run has one thread, beside as many others as there are cores.
    """
    forecaster = _forecaster() if spec.device == "cuda" else None
    return forecaster.seconds(spec) if forecaster else estimate_seconds(spec, _rates, one_thread=one_thread)


def this_card() -> Gpu | None:
    """Returns the smallest of this machine's cards; None without one."""
    here = [measured_card(*card[1:]) for card in cards()]
    return min((card for card in here if card.memory_bytes), key=lambda card: card.memory_bytes, default=None)


def forecast_here(identity: str, spec: RunSpec, *, chosen: bool, one_thread: bool) -> Forecast:
    """Returns the forecast of a run on this machine's processor; its peak is what a scheduler is asked for."""
    unknown = "" if find_model(spec.model).shape else f"the shape of {spec.model} is not known"
    peak = None if unknown else host_bytes(spec)
    return Forecast(identity, spec, chosen, run_seconds(spec, one_thread=one_thread), peak, "", None, "", unknown)


@cache
def _forecaster() -> Forecaster | None:
    card = this_card()
    return Forecaster(card) if card else None


def _rates(spec: RunSpec) -> Rates | None:
    """Returns this machine's rates at a spec's precision; None where there is no torch, as on a login node."""
    try:
        from peftscope.training.ceilings import processor_rates
    except ImportError:
        return None
    return processor_rates(spec)
