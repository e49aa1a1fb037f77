"""Checks of values that come from outside: one message form, field, value and limit."""

from __future__ import annotations

from numbers import Integral

INT64_MAX = 2**63 - 1


def whole_number(name: str, value: object, low: int, high: int = INT64_MAX, high_name: str = "") -> int:
    """The value as an int in [low, high]; a bool is not a number here.

    Raises:
        ValueError: naming the field, the value and the limits; `high_name` says where the upper one comes from.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: {shown(value)} must be a whole number in [{low}, {high_name}{high}]")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}: {shown(number)} must be in [{low}, {high_name}{high}]")
    return number


def number(name: str, value: object, above: float, most: float, *, or_zero: bool = False) -> float:
    """The value as a float in (above, most], or zero where that means "off"; a bool is not a number here.

    Raises:
        ValueError: naming the field, the value and the limits.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (above < value <= most or (or_zero and value == 0)):  # type: ignore[operator]
        limits = f"{'[' if or_zero else '('}{above:g}, {most:g}]"
        raise ValueError(f"{name}: {shown(value)} must be a number in {limits}")
    return float(value)  # type: ignore[arg-type]


def truth(name: str, value: object) -> bool:
    """The value if it is a bool; a ValueError otherwise, because "no" is true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {shown(value)} must be True or False")
    return value


def shown(value: object) -> str:
    """A value as an error message shows it: short, whatever was sent."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:  # repr may refuse thousands of digits
        return f"an integer of {int(value).bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to show"
    return text if len(text) <= 80 else text[:77] + "..."


def few(names: list[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed}, and {len(names) - limit} more"
