"""Arithmetic of whole numbers for launchers.

`triton.cdiv` and `triton.next_power_of_2` serve kernels as well, and take the host some 4 us a
call; a launch needs four.
"""

from __future__ import annotations


def quotient(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def tile(rows: int, width: int, widest: int, elements: int, least: int = 1) -> tuple[int, int]:
    """(rows, width) of a program's tile, powers of two that need not be larger than the matrix.

    Not wider than `widest`, but for `least`, and of no more than `elements` where a row allows it.
    """
    w = max(least, min(power_of_two(width), widest))
    return min(max(1, elements // w), power_of_two(rows)), w
