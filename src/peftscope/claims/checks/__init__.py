"""The checks of the ledger, with one module per family.

A check is a function that returns a ``Measurement`` and decides nothing. The ledger holds its keyword parameters. The
modules import the libraries that they measure with; a reader of the ledger that needs no check imports none of them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache

from peftscope.claims.measurement import Measurement


@cache
def known_checks() -> dict[str, Callable[..., Measurement]]:
    """Returns all checks by their names ``module.function``, which imports what they measure with."""
    found: dict[str, Callable[..., Measurement]] = {}
    for module in pkgutil.iter_modules(__path__):
        content = importlib.import_module(f"{__name__}.{module.name}")
        for name, function in inspect.getmembers(content, inspect.isfunction):
            if function.__module__ == content.__name__ and not name.startswith("_"):
                found[f"{module.name}.{name}"] = function
    return found
