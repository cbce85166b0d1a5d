"""The process behind the interpreter lane: `python -m quest.conformance.worker`, over a pipe.

It runs with TRITON_INTERPRET=1, which has to be set before Triton is imported, and with an eye on
every address (`addresses`).
"""

from __future__ import annotations

import os
import sys

from . import addresses
from .interpreter import receive, send
from .lanes import run


def main() -> None:
    """Serve calls until the pipe closes."""
    # Whatever a kernel prints must not end up in the pipe.
    stream_in, stream_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("quest.conformance.worker runs with TRITON_INTERPRET=1")
    import torch

    torch.set_num_threads(1)
    addresses.watch()
    while True:
        try:
            lane, stage, tensors, static = receive(stream_in)
        except EOFError:
            return
        try:
            send(stream_out, (None, run(lane, stage, tensors, static)))
        except Exception as error:
            send(stream_out, (error, None))


if __name__ == "__main__":
    main()
