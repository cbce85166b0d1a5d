"""The table at the end of a run: 100 columns, one line a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quest.gate.text import duration, short

_NAME = 44
_WIDTHS = (8, 9, 12, 7, 8, 6, 6)


def _line(*cells: str) -> str:
    name, *rest = cells
    return name.ljust(_NAME) + "".join(c.rjust(w) for c, w in zip(rest, _WIDTHS, strict=True))


def lines(
    results: Mapping[str, Mapping[str, Any]], before: Mapping[str, float] | None
) -> Iterator[str]:
    """The table's lines for extra_info by full name; before: a record's ratios by full name."""
    yield _line("", "time", "vs torch", "95%", "was", "of bound", "TOP/s", "gate")
    for fullname, info in results.items():
        was = None if before is None else before.get(fullname)
        yield _line(
            short(fullname) + (" (host)" if info["host_bound"] else ""),
            duration(info["median_us"] / 1e6),
            f"{info['ratio_to_baseline']:.2f}x",
            f"{info['ratio_low']:.2f}-{info['ratio_high']:.2f}",
            "" if before is None else "new" if was is None else f"{was:.2f}x",
            _bound(info),
            f"{info['tera_operations']:.0f}" if info.get("tera_operations") else "",
            f"{info['worst_ratio']:.2f}",
        )


def _bound(info: Mapping[str, Any]) -> str:
    """The fraction of the bound that is nearer: that of copying, or the tensor cores'."""
    copy, rate = info["fraction_of_copy"], info.get("fraction_of_rate", 0.0)
    return f"{copy:.3f} c" if copy >= rate else f"{rate:.3f} t"


def memory(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each benchmark that tells its peak memory."""
    for fullname, info in results.items():
        if "memory_ratio" in info:
            yield (
                f"{short(fullname)} held {info['peak_bytes'] / 2**30:.1f} GiB at most, "
                f"{info['memory_ratio']:.2f} of torch's"
            )


def alone(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each benchmark that was timed by itself, too, and what that says."""
    told = {name: info for name, info in results.items() if "alone_ratio" in info}
    for fullname, info in told.items():
        yield (
            f"{short(fullname)} by itself {duration(info['alone_us'] / 1e6)}, torch "
            f"{duration(info['alone_baseline_us'] / 1e6)}: {info['alone_ratio']:.2f}x "
            f"({info['alone_low']:.2f}, {info['alone_high']:.2f})"
        )
    if told:
        yield "by itself: ours, torch's, torch's, ours, each over and over; (their two ratios)"


def title(device: str) -> str:
    """What stands above a table."""
    return f"{device}: against torch and the copy bound"


LEGEND = (
    "vs torch: torch's time over ours, in turn (above 1 ours is faster); 95%: its interval;",
    "was: in the record; of bound: the nearer of two, over ours: c, the time to copy the bytes",
    "that must move; t, that of the operations at the tensor cores' rate (ceilings.py);",
    "TOP/s: 10^12 multiplications and additions of the product a second;",
    "gate: worst error over its bound, 1 is the limit. benchmarks/NOTES.md has the rest.",
)


def whole(
    results: Mapping[str, Mapping[str, Any]], before: Mapping[str, float] | None
) -> Iterator[str]:
    """All that is told of a run below its title; as `lines` has it."""
    yield from lines(results, before)
    yield from LEGEND
    yield from memory(results)
    yield from alone(results)
