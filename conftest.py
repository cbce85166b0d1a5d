"""Refuses pytest-benchmark's records in one line where benchmarks/ is not named.

benchmarks/conftest.py tells pytest-benchmark where the records are, and has to do so before that
sets itself up. pytest loads it so early only where its folder is among the arguments; otherwise
pytest-benchmark would look for records elsewhere and die of finding none.
"""

from __future__ import annotations

from pathlib import Path

import pytest

# The public court's options; an installation registers them, a bare checkout does not.
pytest_plugins = ["quest.conformance.plugin"]

BENCHMARKS = Path(__file__).parent / "benchmarks" / "conftest.py"
OPTIONS = ("--benchmark-compare", "--benchmark-save", "--benchmark-autosave")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark looks for records."""
    given = [name for name in OPTIONS if config.getoption(name, None)]
    loaded = {getattr(plugin, "__file__", None) for plugin in config.pluginmanager.get_plugins()}
    if given and str(BENCHMARKS) not in loaded:
        raise pytest.UsageError(f"{given[0]} needs the folder: pytest benchmarks/ {given[0]}")
