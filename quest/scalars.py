"""Numbers that a user gives: whether they are some, and how an error shows them."""

from __future__ import annotations


def is_number(value: object) -> bool:
    """Whether it is a float or an int, and no bool."""
    return isinstance(value, float | int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """`repr`, but for an int that is too long to read, which Python may refuse to print."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return repr(value)
