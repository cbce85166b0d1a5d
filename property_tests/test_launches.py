"""What a launch hands to the driver, seen by one that reads it as the driver would; no GPU."""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quest.kernels import cuda, recorded

real = pytest.importorskip("cuda.bindings.driver")

LAYOUT = "P16sPif"  # a pointer, a map, a pointer, an int, a float


class Driver:
    """Keeps every launch: function, stream, blocks, threads, shared, attributes, parameters."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.answers: list[int] = []
        self.dropped: list[int] = []
        self.asked: list[int] = []  # nodes that were to be told anew
        self.graphs: list[list[int]] = []
        self.nodes: dict[int, tuple[Any, ...]] = {}
        self.overlaps: dict[int, bool] = {}
        self.copies: dict[int, tuple[int, int, int]] = {}
        self.waits: list[int] = []  # copies for which the first kernel of a graph waits

    def cuLaunchKernelEx(self, *arguments: ctypes.c_void_p) -> int:
        config, function, parameters, extra = (a.value for a in arguments)
        assert config
        assert parameters
        assert extra is None
        # CUlaunchConfig of cuda.h: seven numbers, the stream, the attributes and their number.
        *sizes, stream, attributes, count = struct.unpack("7IQQI", ctypes.string_at(config, 52))
        values = _values(parameters)
        # Of an attribute the first four bytes are its name.
        names = [struct.unpack("i", ctypes.string_at(attributes + 64 * i, 4))[0]
                 for i in range(count)]  # fmt: skip
        self.seen.append((function, stream, sizes, names, values))
        return self.answers.pop(0) if self.answers else 0

    # Graphs, by number. nodes: what each was last told, of all; overlaps: those that need not wait.
    def begin(self, _: int) -> tuple[int, int]:
        self.graphs.append([])
        return 0, 500 + len(self.graphs) - 1

    def add(self, graph: int, before: None, count: int, told: Any) -> tuple[int, int]:
        assert (before, count) == (None, 0)
        node = 600 + len(self.nodes)
        self.nodes[node] = _told(int(told.getPtr()))
        self.graphs[graph - 500].append(node)
        return 0, node

    def copy(
        self, graph: int, before: None, count: int, told: Any, context: object
    ) -> tuple[int, int]:
        assert (before, count, context) == (None, 0, "a context")
        # CUDA_MEMCPY3D of cuda.h: of each side four numbers, a kind and addresses; the size.
        *_, kind, _, at = struct.unpack("4QI4xQQ", ctypes.string_at(int(told.getPtr()), 56))
        *_, other, _, to = struct.unpack("4QI4xQQ", ctypes.string_at(int(told.getPtr()) + 88, 56))
        *_, size, height, depth = struct.unpack("3Q", ctypes.string_at(told.getPtr() + 176, 24))
        assert kind == other == 2  # CU_MEMORYTYPE_DEVICE
        assert height == depth == 1
        self.copies[900 + len(self.copies)] = (to, at, size)
        return 0, 900 + len(self.copies) - 1

    def depend(
        self, graph: int, before: list[int], after: list[int], edges: list[Any], count: int
    ) -> tuple[int]:
        assert len(before) == len(after) == len(edges) == count
        for one, other, edge in zip(before, after, edges, strict=True):
            nodes = self.graphs[graph - 500]
            if one in self.copies:
                assert nodes == [other]
                assert edge.type == 0
                self.waits.append(one)
                continue
            assert nodes[-2:] == [one, other]
            assert (edge.type, edge.from_port, edge.to_port) in ((0, 0, 0), (1, 1, 0))
            self.overlaps[other] = bool(edge.type)
        return (0,)

    def finish(self, graph: int, _: int) -> tuple[int, int]:
        assert all(node in self.overlaps for node in self.graphs[graph - 500][1:])
        return 0, graph + 200

    def drop(self, what: int) -> tuple[int]:
        self.dropped.append(what)
        return (0,)

    def cuGraphExecKernelNodeSetParams_v2(self, *arguments: ctypes.c_void_p) -> int:
        ready, node, told = (a.value for a in arguments)
        assert told
        assert node in self.graphs[ready - 700]
        self.asked.append(node)
        assert self.nodes[node][:2] == _told(told)[:2]
        status = self.answers.pop(0) if self.answers else 0
        if not status:
            self.nodes[node] = _told(told)
        return status

    def cuGraphLaunch(self, *arguments: ctypes.c_void_p) -> int:
        ready, stream = (a.value for a in arguments)
        for node in self.graphs[ready - 700]:
            function, sizes, values = self.nodes[node]
            names = [OVERLAPS] if self.overlaps.get(node) else []
            self.seen.append((function, stream or 0, sizes, names, values))
        return self.answers.pop(0) if self.answers else 0


def _values(parameters: int) -> tuple[Any, ...]:
    """What an array of pointers to parameters of LAYOUT says."""
    pointers = struct.unpack("5Q", ctypes.string_at(parameters, 40))
    sizes_of = (8, 16, 8, 4, 4)
    raw = [ctypes.string_at(at, n) for at, n in zip(pointers, sizes_of, strict=True)]
    return (
        struct.unpack("P", raw[0])[0], raw[1], struct.unpack("P", raw[2])[0],
        struct.unpack("i", raw[3])[0], struct.unpack("f", raw[4])[0],
    )  # fmt: skip


def _told(node: int) -> tuple[Any, ...]:
    """Function, sizes and parameters of a CUDA_KERNEL_NODE_PARAMS of cuda.h."""
    function, *sizes, parameters, extra = struct.unpack("Q7I4xQQ", ctypes.string_at(node, 56))
    assert extra == 0
    return function, sizes, _values(parameters)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(cuda, "library", lambda: made)
    for name, function in (
        ("cuGraphCreate", made.begin), ("cuGraphAddKernelNode", made.add),
        ("cuGraphAddDependencies", made.depend), ("cuGraphInstantiate", made.finish),
        ("cuGraphAddMemcpyNode", made.copy),
        ("cuGraphExecDestroy", made.drop), ("cuGraphDestroy", made.drop),
    ):  # fmt: skip
        monkeypatch.setattr(real, name, function)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: 7000 + device, raising=False
    )
    return made


def kernel(number: int = 99) -> cuda.Kernel:
    return cuda.Kernel(number, "a context", 3, threads=128, shared=4096, layout=LAYOUT)


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


def test_what_is_ready_does_not_grow_with_every_length(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "MOST_READY", 3)
    one, held = kernel(), []
    for blocks in (5, 6, 7, 5, 8, 9, 5):
        one.launch(blocks, blocks, MAP, 0, 0, 0.0)
        assert driver.seen[-1][2][0] == driver.seen[-1][4][0] == blocks
        held.append(len(one._local.ready))
    assert held == [1, 2, 3, 3, 1, 2, 3]


def test_each_launch_goes_to_the_stream_that_is_current(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = kernel()
    with cuda.recording() as taken:
        one.launch(1, 1000, MAP, 0, 0, 0.0)
    for stream in (7, 8, 0, 0, 7):
        recorded.Again(taken, stream, 1000).queue(1000)
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
    told: list[Any] = []
    monkeypatch.setattr(real, "cuCtxSetCurrent", lambda context: (0, context))
    monkeypatch.setattr(cuda, "done", told.append)
    driver.answers = [201]  # CUDA_ERROR_INVALID_CONTEXT
    kernel().launch(1, 0, MAP, 0, 0, 0.0)
    assert told == [(0, "a context")]
    assert len(driver.seen) == 2
    assert driver.seen[0] == driver.seen[1]


def test_launches_again(driver: Driver) -> None:
    """Two kernels, each with one of the addresses; what the kernels were told since is nothing."""
    first, second = kernel(1), kernel(2)
    with cuda.recording() as taken:
        first.launch(2, 1000, MAP, 500, 1, 1.0)
        second.launch(4, 500, MAP[::-1], 2000, 2, 2.0, overlap=True)
    assert len(taken) == 2
    again = recorded.Again(taken, 7, 1000, 2000)
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


def _two(driver: Driver) -> recorded.Again:
    """Of two kernels, whose launches are not seen."""
    with cuda.recording() as taken:
        kernel(1).launch(2, 1000, MAP, 500, 1, 1.0)
        kernel(2).launch(4, 500, MAP, 2000, 2, 2.0, overlap=True)
    driver.seen.clear()
    return recorded.Again(taken, 7, 1000, 2000)


@pytest.mark.parametrize("at", range(3))  # the parameters of either kernel, and the launch
def test_graphs_that_the_driver_refuses(
    at: int, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = _two(driver)
    again.queue(8, 9)
    driver.seen.clear()
    told: list[Any] = []
    monkeypatch.setattr(cuda, "done", told.append)
    driver.answers = [0] * at + [1]  # CUDA_ERROR_INVALID_VALUE
    again.queue(1, 2)
    assert [int(status) for (status,) in told] == [1]
    # Without a context all is told again.
    monkeypatch.setattr(real, "cuCtxSetCurrent", lambda context: (0, context))
    driver.seen.clear()
    told.clear()
    driver.answers = [0] * at + [201]  # CUDA_ERROR_INVALID_CONTEXT
    again.queue(3, 4)
    assert told == [(0, "a context")]
    assert [(values[0], values[2]) for *_, values in driver.seen[-2:]] == [(3, 500), (500, 4)]
    assert len(driver.seen) == (2 if at < 2 else 4)  # what was refused is seen here, too


def test_a_kernel_is_told_what_has_changed(driver: Driver) -> None:
    """And no more: that takes the host as long as it takes to queue half of a graph.

    Of the addresses that two graphs were told last nothing has: one that is kept while the next is
    asked for, and then let go, comes back every other time. A second graph is for those that do.
    """
    again = _two(driver)
    for x, y, asked, graphs in (
        (1000, 2000, [], 1), (11, 2000, [600], 1), (1000, 2000, [], 2), (11, 2000, [], 2),
        (11, 22, [601], 2), (11, 22, [], 2), (1000, 2000, [], 2), (11, 2000, [602], 2),
        (1, 2, [600, 601], 2), (11, 2000, [], 2), (1, 2, [], 2),
    ):  # fmt: skip
        again.queue(x, y)
        assert sorted(driver.asked) == asked
        assert [(values[0], values[2]) for *_, values in driver.seen] == [(x, 500), (500, y)]
        assert len(driver.graphs) == graphs
        driver.asked.clear()
        driver.seen.clear()


@pytest.mark.parametrize("count", [1, 2])
def test_copies_before_the_first_kernel(count: int, driver: Driver) -> None:
    """Which waits for all of them, in each graph; a launch alone is a graph then, too."""
    with cuda.recording() as taken:
        kernel(1).launch(2, 1000, MAP, 500, 1, 1.0, overlap=True)
        if count > 1:
            kernel(2).launch(4, 500, MAP, 2000, 2, 2.0, overlap=True)
    driver.seen.clear()
    copies = [(1 << 40, 7, 30), ((1 << 40) + 30, 2**63 + 1, 2)]
    again = recorded.Again(taken, 7, 1000, copies=copies)
    assert again.copies == copies
    for x in (1000, 5, 1000):
        again.queue(x)
        assert driver.seen[0][4][0] == x
        assert [names for *_, names, _ in driver.seen] == [[], [OVERLAPS]][:count]
        driver.seen.clear()
    assert list(driver.copies.values()) == 2 * copies
    assert driver.waits == list(driver.copies)
    assert len(driver.graphs) == 2


def test_a_launch_alone_reads_its_addresses_each_time(driver: Driver) -> None:
    with cuda.recording() as taken:
        kernel().launch(2, 1000, MAP, 500, 1, 1.0)
    again = recorded.Again(taken, 7, 1000)
    driver.seen.clear()
    for x in (1000, 11, 12, 11, 11, 1000, 11, 12):
        again.queue(x)
        assert [values[0] for *_, values in driver.seen] == [x]
        driver.seen.clear()
    assert not driver.graphs


@pytest.mark.parametrize("at", range(3))
def test_what_was_refused_is_told_again(
    at: int, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError

    again = _two(driver)
    again.queue(8, 9)
    monkeypatch.setattr(cuda, "done", refuse)
    driver.answers = [0] * at + [1]  # CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError):
        again.queue(1, 2)
    driver.seen.clear()
    driver.asked.clear()
    again.queue(1, 2)
    again.queue(8, 9)
    assert [(values[0], values[2]) for *_, values in driver.seen] == [
        (1, 500), (500, 2), (8, 500), (500, 9)
    ]  # fmt: skip
    assert driver.asked == [600, 601] * 2  # a second graph is refused, too


def test_a_second_graph_that_the_driver_refuses(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of memory, or of a context: the first is told in its place."""
    again, made = _two(driver), recorded.Graph

    def refuse(*_: object) -> None:
        raise RuntimeError

    again.queue(11, 2000)
    monkeypatch.setattr(recorded, "Graph", refuse)
    driver.asked.clear()
    driver.seen.clear()
    for x in (1000, 11, 11, 1000):
        again.queue(x, 2000)
    monkeypatch.setattr(recorded, "Graph", made)
    again.queue(11, 2000)
    assert [values[0] for *_, values in driver.seen[::2]] == [1000, 11, 11, 1000, 11]
    assert driver.asked == [600] * 3
    assert len(driver.graphs) == 2


def test_interrupted_launches_begin_anew(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the interrupt came: with the addresses that are asked for, then."""
    with cuda.recording() as taken:
        kernel().launch(2, 1000, MAP, 500, 1, 1.0)
    again = recorded.Again(taken, 7, 1000)
    ((_, words, at),) = again._places

    class Words:
        def __setitem__(self, at: int, address: int) -> None:
            words[at] = address
            raise KeyboardInterrupt

    again._places = ((0, Words(), at),)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        again.queue(2)
    again._places = ((0, words, at),)
    driver.seen.clear()
    for x in (1000, 2, 1000):
        again.queue(x)
    assert [values[0] for *_, values in driver.seen] == [1000, 2, 1000]


def test_a_graph_ends_with_its_call(driver: Driver) -> None:
    again = _two(driver)
    again.queue(8, 9)
    again.queue(1000, 2000)
    assert not driver.dropped
    del again
    gc.collect()
    assert sorted(driver.dropped) == [500, 501, 700, 701]


@pytest.mark.parametrize("addresses", [(1000, 2000), (1000, 1000), (500,)])
def test_an_address_that_stands_elsewhere(driver: Driver, addresses: tuple[int, ...]) -> None:
    one = kernel()
    with cuda.recording() as taken:
        one.launch(2, 1000 if len(addresses) > 1 else 500, MAP, 500, 1, 1.0)
        one.launch(2, 1000 if addresses == (1000, 1000) else 3, MAP, 4, 1, 1.0)
    with pytest.raises(ValueError, match="the addresses stand in"):
        recorded.Again(taken, 7, *addresses)


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
