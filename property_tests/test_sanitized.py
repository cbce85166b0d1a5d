"""`sanitized`: which launches its arguments select, and a tool that does not end."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
import torch

from property_tests import sanitized
from property_tests.processes import gone

NAMES = ["product wide", "product wide float32", "gated product wide", "few"]


@pytest.mark.parametrize(
    ("wanted", "selected"),
    [
        ([], NAMES),
        (["product wide"], ["product wide"]),
        (["wide"], NAMES[:3]),
        (["few", "gated"], ["gated product wide", "few"]),
    ],
)
def test_launches_that_are_chosen(wanted: list[str], selected: list[str]) -> None:
    assert sanitized.chosen(wanted, NAMES) == selected


def test_a_word_that_selects_nothing() -> None:
    with pytest.raises(SystemExit, match="nothing is called fwe; there are product wide, "):
        sanitized.chosen(["few", "fwe"], NAMES)


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitized.cuda, "unavailable", lambda _: "there is no CUDA device")
    with pytest.raises(SystemExit, match="can't be launched here: there is no CUDA device"):
        sanitized.main(["few"])
    with pytest.raises(SystemExit, match="nothing is called fwe"):  # which is told all the same
        sanitized.main(["fwe"])


def _stands_for_the_tool(script: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A script in its place, as on a machine with a GPU."""
    tool = folder / "tool"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    patch.setattr(sanitized.shutil, "which", lambda _: str(tool))
    patch.setattr(sanitized.hopper, "unavailable", lambda _: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize(
    ("says", "ends", "good"),
    [
        ("few\nproduct wide", 0, True),
        ("few\nproduct wide", 9, False),  # a fault was found
        ("few\nproduct wide float32", 0, False),  # another launch than the one that is wanted
        ("few", 0, False),
    ],
)
def test_what_a_tool_says(
    says: str, ends: int, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stands_for_the_tool(f"echo '{says}'\nexit {ends}", tmp_path, monkeypatch)
    with contextlib.nullcontext() if good else pytest.raises(AssertionError):
        sanitized.check("racecheck", ("product wide", "few"))


def test_a_tool_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/child\necho product wide\nwait"
    _stands_for_the_tool(script, tmp_path, monkeypatch)
    monkeypatch.setattr(sanitized, "TIME", 2)
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"(?s)racecheck did not end in 2 s.*product"):
        sanitized.check("racecheck", ("product wide",))
    assert time.monotonic() - start < 30
    assert gone(int((tmp_path / "child").read_text()))
