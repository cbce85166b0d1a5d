"""All of torch.ops.quest, registered: for programs that know the operators by that name alone.

A program that `torch.export` has saved is one: it is loaded behind ``import quest.operators``.
Where nobody has imported PyTorch before, ``import quest`` registers nothing yet.
"""

from __future__ import annotations

from . import mlp  # noqa: F401, which is made of all that register some
