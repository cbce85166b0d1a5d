"""What the rules on texts of CUDA C++ read, is what C means."""

from __future__ import annotations

import pytest

from property_tests.cuda_reader import Names, _compiled, statements, value, worlds

pytestmark = pytest.mark.whole


@pytest.mark.parametrize(
    ("c", "expected"),
    [
        # The looser operator takes what the others make.
        ("1 + 2 * 3", 7), ("1 << 2 + 1", 8), ("8 >> 1 < 2", 0), ("1 < 2 == 1", 1),
        ("6 & 2 == 2", 0), ("2 ^ 3 & 1", 3), ("1 | 2 ^ 3", 1), ("0 && 1 | 1", 0),
        ("1 || 0 && 0", 1), ("0 || 0 ? 1 : 2", 2), ("-1 + 2", 1), ("!0 + 1", 2), ("~1 & 7", 6),
        ("(6 & 2) == 2", 1), ("2 * (3 + 4)", 14), ("- -3", 3), ("+3", 3),
        # From the left; a comparison is a number.
        ("7 - 2 - 1", 4), ("16 / 4 / 2", 2), ("64 >> 2 >> 1", 8), ("3 > 2 > 1", 0),
        ("2 == 2 == 1", 1), ("0 ? 1 : 0 ? 2 : 3", 3), ("1 ? 2 : 0 ? 3 : 4", 2),
        # A quotient is cut; what remains has the dividend's sign.
        ("-7 / 2", -3), ("7 / -2", -3), ("-7 / -2", 3), ("-7 % 3", -1), ("7 % -3", 1),
        # What is not 0 is true; as a number it is 1.
        ("5 && 2", 1), ("5 || 0", 1), ("!5", 0), ("2 >= 2", 1), ("2 <= 1", 0), ("2 != 2", 0),
        ("0x1Fu", 31), ("4ull + 1ll", 5), ("rows * 2 + 1", 7),
    ],
)  # fmt: skip
def test_expressions(c: str, expected: int) -> None:
    assert value(c, {"rows": 3}) == expected


@pytest.mark.parametrize("c", ["columns", "f(1)", "1.5", "a[0]", "1 +", "(1", "1 ? 2", "", "1 2"])
def test_what_has_no_value(c: str) -> None:
    with pytest.raises(KeyError):
        value(c, {"a": 1, "f": 2})


def test_the_first_branch_that_holds_is_compiled() -> None:
    text = """
        #if A
        one;
        #if B
        one_b;
        #endif
        #elif B
        two;
        #else
        three;  // not compiled
        #endif
        #ifndef C
        #define C 4 + A
        #endif
        constexpr int D = C * 2, E = x;
        """
    for a, b, kept in ((1, 1, "one; one_b;"), (1, 0, "one;"), (0, 1, "two;"), (0, 0, "three;")):
        names: Names = {"A": a, "B": b}
        assert _compiled(text, names) == f"{kept} constexpr int D = C * 2, E = x;"
        assert names == {"A": a, "B": b, "C": 4 + a, "D": 2 * (4 + a)}
    names = {"A": 0, "B": 0, "C": 9}
    _compiled(text, names)
    assert names["D"] == 18


def seen(body: str, **names: int) -> list[tuple[int, ...]]:
    """What `use` is given in all turns, where all of it has a value."""
    found = []
    for line, around in statements(body):
        if line.startswith("use("):
            told = line.removeprefix("use(").removesuffix(")").split(", ")
            found += [tuple(value(c, n) for c in told) for n in worlds(around, names)]
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("for (int i = 0; i < n; i++) use(i);", [0, 1, 2, 3]),
        ("for (u32 i = n; i > 0; i /= 2) { use(i); }", [4, 2, 1]),
        ("for (int i = n - 1; i >= 0; i--) use(i);", [3, 2, 1, 0]),
        ("for (int i = 1; i <= n; i += 2) use(i * 10);", [10, 30]),
        ("for (int i = n; i < n; i++) use(i);", []),
        ("for (int i = 0; i < 2; i++) for (int j = i; j < 2; j++) use(2 * i + j);", [0, 1, 3]),
        ("for (int i = 0; i < n; i++) if (i % 2) use(i); else use(-i);", [1, 3, 0, -2]),
        ("for (int i = 0; i < n; i++) { if (i == 2) continue; use(i); }", [0, 1, 3]),
        ("for (int i = 0; i < n; i++) { const int k = i * n; use(k + 1); }", [1, 5, 9, 13]),
        ("if (n > 4) { use(1); } else if (n > 3) use(2); else use(3);", [2]),
        ("if (unknown) use(1); else use(2);", [1, 2]),
        ("if (n == 4) { const int n = 7; use(n); } use(n);", [7, 4]),
    ],
)
def test_statements_in_all_their_turns(body: str, expected: list[int]) -> None:
    assert seen(body, n=4) == [(v,) for v in expected]
