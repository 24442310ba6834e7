"""Words for numbers: bytes, times and quantities, with intervals and signs; lists of words, and values by key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

MIB, GIB = 2**20, 2**30

MOST_LISTED = 12
"""The most values of a row that are named one by one."""


def is_missing(value: Any) -> bool:
    """Returns whether a value is None or not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def formatted(value: Any, form: str, unit: float = 1) -> str:
    """Returns a number in this form and unit, or a dash if it is missing."""
    return "-" if is_missing(value) else format(value / unit, form)


def spoken_bound(percent: float | None) -> str:
    """Returns the percent that a difference is within, rounded up to a decimal, so that what is said stays true.

    >>> spoken_bound(2.52), spoken_bound(2.5), spoken_bound(None)
    ('2.6', '2.5', '-')
    """
    return "-" if percent is None or math.isnan(percent) else f"{math.ceil(10 * percent) / 10:.1f}"


def plain(value: Any) -> str:
    """Returns the value of a setting, or a dash if it is missing.

    >>> plain(0.0003), plain(16), plain("bf16"), plain(None)
    ('0.0003', '16', 'bf16', '-')
    """
    return "-" if is_missing(value) else f"{value:g}" if isinstance(value, float) else str(value)


def signed(value: float, form: str) -> str:
    """Returns a number with its sign.

    >>> signed(0.25, ".1f"), signed(-0.25, ".2f")
    ('+0.2', '−0.25')
    """
    return format(value, f"+{form}").replace("-", "−")


def percent(share: float) -> float:
    """Returns a share in per cent, cut at 0 and 100, beyond which a Student interval of shares may reach."""
    return 100 * min(max(share, 0.0), 1.0)


def interval(value: float, low: Any, high: Any, told: Callable[[float], str], unit: str = "") -> str:
    """Returns a number with its unit and, in brackets, the bounds of its interval unless they are missing.

    >>> interval(0.5, 0.25, 0.75, lambda share: f"{percent(share):.0f}", " %"), interval(1, None, None, str)
    ('50 % [25, 75]', '1')
    """
    return f"{told(value)}{unit}" + ("" if is_missing(low) else f" [{told(low)}, {told(high)}]")


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Returns the values of each key, in the order of both.

    >>> grouped([("b", 1), ("a", 2), ("b", 3)])
    {'b': [1, 3], 'a': [2]}
    """
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def counted(number: int, one: str, more: str = "") -> str:
    """Returns a number of things; several are called ``more``, or have an s.

    >>> counted(1, "item"), counted(2000, "item"), counted(2, "pair of runs", "pairs of runs")
    ('1 item', '2,000 items', '2 pairs of runs')
    """
    return f"{number:,} {one if number == 1 else more or f'{one}s'}"


def quoted(name: str) -> str:
    """Returns a name, in quotes if it has a comma, so that a reader sees where it ends."""
    return f"“{name}”" if "," in name else name


def listed(values: Iterable[Any], separator: str = ", ", last: str = "") -> str:
    """Returns the values in a row, with a separator between two, or ``last`` before the last; of many, the first ones.

    >>> listed([1, 2, 3]), listed("abc", last=" and "), listed(range(100))
    ('1, 2, 3', 'a, b and c', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 88 more')
    """
    names = [plain(value) for value in values]
    if len(names) > MOST_LISTED:
        return f"{separator.join(names[:MOST_LISTED])} and {len(names) - MOST_LISTED} more"
    return separator.join([*names[:-2], (last or separator).join(names[-2:])])


def capitalised(text: str) -> str:
    """Returns a sentence with a capital letter, but for a first word that has a small one on purpose.

    >>> capitalised("full fine-tuning trains all."), capitalised("rsLoRA scales.")
    ('Full fine-tuning trains all.', 'rsLoRA scales.')
    """
    return text[0].upper() + text[1:] if text.split()[0].islower() else text


def spoken_bytes(size: float, digits: int = 2, sign: bool = False) -> str:
    """Returns bytes as people read them: in GiB with so many digits, or in MiB; a difference with its sign.

    >>> spoken_bytes(3 * 2**30), spoken_bytes(5 * 2**20, sign=True), spoken_bytes(-(2**34), 0)
    ('3.00 GiB', '+5.0 MiB', '-16 GiB')
    """
    plus = "+" * (sign and size > 0)
    return f"{plus}{size / GIB:.{digits}f} GiB" if abs(size) >= GIB / 10 else f"{plus}{size / MIB:.1f} MiB"


def spoken_time(seconds: float) -> str:
    """Returns a duration.

    >>> spoken_time(75), spoken_time(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def spoken_number(value: float | bool | str | None, digits: int = 3) -> str:
    """Returns a measured quantity, with so many digits.

    >>> spoken_number(16777216), spoken_number(0.000123456, 4), spoken_number(True), spoken_number(None)
    ('16,777,216', '0.0001235', 'yes', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    sign, size = "−" * (value < 0), abs(value)
    if float(value).is_integer() and size < 1e12:
        return f"{sign}{int(size):,}"
    return f"{sign}{size:,.{digits}g}" if size < 10**digits - 0.5 else f"{sign}{size:,.0f}"


def scale_of(unit: str) -> int:
    """Returns the factor with which a quantity of this unit is told: shares are told in percent."""
    return 100 if unit.startswith(("as a share of ", "of ")) else 1


def spoken_quantity(value: float | bool | str | None, unit: str, up_to: float | None = None) -> str:
    """Returns a quantity with its unit, or a range that goes up to a second one, as people say it.

    >>> spoken_quantity(1, "cards"), spoken_quantity(0.9, "as a share of steps"), spoken_quantity(-0.5, "as a slope")
    ('1 card', '90 % of steps', 'a slope of −0.5')
    >>> spoken_quantity(6, "GB", up_to=7), spoken_quantity(0.5, "of NF4's error"), spoken_quantity("r × n", "")
    ('6 to 7 GB', "50 % of NF4's error", 'r × n')
    """
    if value is None or isinstance(value, str | bool) or not unit:
        return f"{spoken_number(value)} {unit}".strip()
    numbers = [spoken_number(scale_of(unit) * number) for number in (value, up_to) if number is not None]
    number = " to ".join(numbers)
    if scale_of(unit) > 1:
        return f"{number} % {unit.removeprefix('as a share ')}"
    if unit.startswith("as a "):
        return f"a {unit.removeprefix('as a ')} of {number}"
    noun, space, rest = unit.partition(" ")
    singular = value == 1 and up_to is None and len(noun) > 1
    return f"{number} {noun.removesuffix('s') if singular else noun}{space}{rest}"
