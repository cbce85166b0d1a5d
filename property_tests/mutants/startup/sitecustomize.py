"""Python imports this where a process starts: it traces those that a traced test starts."""

import os
import sys
from pathlib import Path

if "QUEST_MUTANTS_TRACE" in os.environ:
    root = Path(__file__).resolve().parents[3]
    # Not as property_tests.mutants.trace: nothing of the project is imported before its time.
    import importlib.util

    spec = importlib.util.spec_from_file_location("_trace", Path(__file__).parents[1] / "trace.py")
    if spec is not None and spec.loader is not None:
        trace = importlib.util.module_from_spec(spec)
        sys.modules["_trace"] = trace
        spec.loader.exec_module(trace)
        trace.start(Path(os.environ["QUEST_MUTANTS_TRACE"]), root)
