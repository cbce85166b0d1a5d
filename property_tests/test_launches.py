"""What a launch hands to the driver, seen by one that reads it as the driver would; no GPU."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quest.kernels import cuda

pytest.importorskip("cuda.bindings")

LAYOUT = "P16sPif"  # a pointer, a map, a pointer, an int, a float


class Driver:
    """Keeps every launch: function, stream, blocks, threads, shared, attributes, parameters."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.answers: list[int] = []

    def cuLaunchKernelEx(self, *arguments: ctypes.c_void_p) -> int:
        config, function, parameters, extra = (a.value for a in arguments)
        assert config
        assert parameters
        assert extra is None
        # CUlaunchConfig of cuda.h: seven numbers, the stream, the attributes and their number.
        *sizes, stream, attributes, count = struct.unpack("7IQQI", ctypes.string_at(config, 52))
        pointers = struct.unpack("5Q", ctypes.string_at(parameters, 40))
        sizes_of = (8, 16, 8, 4, 4)
        raw = [ctypes.string_at(at, n) for at, n in zip(pointers, sizes_of, strict=True)]
        values = (
            struct.unpack("P", raw[0])[0], raw[1], struct.unpack("P", raw[2])[0],
            struct.unpack("i", raw[3])[0], struct.unpack("f", raw[4])[0],
        )  # fmt: skip
        # Of an attribute the first four bytes are its name.
        names = [struct.unpack("i", ctypes.string_at(attributes + 64 * i, 4))[0]
                 for i in range(count)]  # fmt: skip
        self.seen.append((function, stream, sizes, names, values))
        return self.answers.pop(0) if self.answers else 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: 7000 + device, raising=False
    )
    return made


def kernel(number: int = 99) -> cuda.Kernel:
    return cuda.Kernel(number, None, 3, threads=128, shared=4096, layout=LAYOUT)


MAP = bytes(range(16))
OVERLAPS = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def test_a_launch(driver: Driver) -> None:
    one = kernel()
    one.launch(5, 1 << 40, MAP, 2**63 + 1, -3, 0.5)
    one.launch(6, 17, MAP[::-1], 18, 4, -1.0, overlap=True)
    one.launch(5, 19, MAP, 20, 5, 2.0)
    assert driver.seen == [
        (99, 7003, [5, 1, 1, 128, 1, 1, 4096], [], (1 << 40, MAP, 2**63 + 1, -3, 0.5)),
        (99, 7003, [6, 1, 1, 128, 1, 1, 4096], [OVERLAPS], (17, MAP[::-1], 18, 4, -1.0)),
        (99, 7003, [5, 1, 1, 128, 1, 1, 4096], [], (19, MAP, 20, 5, 2.0)),
    ]


def test_each_launch_goes_to_the_stream_that_is_current(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = kernel()
    with cuda.recording() as taken:
        one.launch(1, 1000, MAP, 0, 0, 0.0)
    for stream in (7, 8, 0, 0, 7):
        cuda.Again(taken, stream, 1000).queue(1000)
        assert driver.seen[-1][1] == stream
        monkeypatch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda _, s=stream: s, raising=False
        )
        one.launch(1, 1000, MAP, 0, 0, 0.0)
        assert driver.seen[-1][1] == stream


def test_what_the_driver_refuses(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(cuda, "done", told.append)
    driver.answers = [1]  # CUDA_ERROR_INVALID_VALUE
    kernel().launch(1, 0, MAP, 0, 0, 0.0)
    assert [int(status) for (status,) in told] == [1]
    assert len(driver.seen) == 1


def test_a_thread_without_a_context(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver as real

    told: list[Any] = []
    monkeypatch.setattr(real, "cuCtxSetCurrent", lambda context: (0, context))
    monkeypatch.setattr(cuda, "done", told.append)
    driver.answers = [201]  # CUDA_ERROR_INVALID_CONTEXT
    kernel().launch(1, 0, MAP, 0, 0, 0.0)
    assert told == [(0, None)]
    assert len(driver.seen) == 2
    assert driver.seen[0] == driver.seen[1]


def test_launches_again(driver: Driver) -> None:
    """Two kernels, each with one of the addresses; what the kernels were told since is nothing."""
    first, second = kernel(1), kernel(2)
    with cuda.recording() as taken:
        first.launch(2, 1000, MAP, 500, 1, 1.0)
        second.launch(4, 500, MAP[::-1], 2000, 2, 2.0, overlap=True)
    assert len(taken) == 2
    again = cuda.Again(taken, 7, 1000, 2000)
    first.launch(9, 1, MAP, 2, 3, 4.0)
    second.launch(9, 1, MAP, 2, 3, 4.0, overlap=True)
    assert len(taken) == 2  # the block has ended
    driver.seen.clear()
    for x, y in ((11, 22), (2000, 1000)):
        again.queue(x, y)
        assert driver.seen == [
            (1, 7, [2, 1, 1, 128, 1, 1, 4096], [], (x, MAP, 500, 1, 1.0)),
            (2, 7, [4, 1, 1, 128, 1, 1, 4096], [OVERLAPS], (500, MAP[::-1], y, 2, 2.0)),
        ]
        driver.seen.clear()


@pytest.mark.parametrize("addresses", [(1000, 2000), (1000, 1000), (500,)])
def test_an_address_that_stands_elsewhere(driver: Driver, addresses: tuple[int, ...]) -> None:
    one = kernel()
    with cuda.recording() as taken:
        one.launch(2, 1000 if len(addresses) > 1 else 500, MAP, 500, 1, 1.0)
        one.launch(2, 1000 if addresses == (1000, 1000) else 3, MAP, 4, 1, 1.0)
    with pytest.raises(ValueError, match="the addresses stand in"):
        cuda.Again(taken, 7, *addresses)


def test_another_thread_s_launches_are_its_own(driver: Driver) -> None:
    one = kernel()
    with cuda.recording() as taken:
        run: Callable[[], None] = lambda: one.launch(1, 0, MAP, 0, 0, 0.0)  # noqa: E731
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not taken
        with cuda.recording() as inner:
            run()
        run()
    assert (len(taken), len(inner)) == (1, 1)
