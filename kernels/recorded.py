"""Launches that were recorded, made again with other addresses in the places of some.

Several become one CUDA graph, whose kernels are told their parameters anew before it is queued, if
these have changed: that takes the host at most half of what the launches take. For addresses that
come back there is a second graph. One launch stays a launch, which may overlap with the kernel
before it.
Source: NVIDIA, CUDA Driver API, graph management.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import cuda

if TYPE_CHECKING:
    from .cuda import Ready


Copies = Sequence[tuple[int, int, int]]
MOST_GRAPHS = 2  # of an `Again`; each can take up to 0.1 MB of the device's memory


class _Way(NamedTuple):
    """One way to queue the launches, with the addresses that it was told last.

    tells: what tells each kernel of a graph its parameters; none of a launch, which reads them as
    it is queued. queues: the one call of the driver that queues all.
    """

    graph: Graph | None
    tells: tuple[Callable[[], int], ...]
    queues: list[Callable[[], int]]


class Again:
    """Recorded launches, at least one, with other addresses.

    stream: on which they are queued. addresses: those that were given, each to one parameter of one
    of the launches. ValueError for one that was not, or to several. copies: (to, from, bytes) of
    the device's memory, before the first launch. Of the thread that made it.
    """

    def __init__(
        self, launches: Sequence[Ready], stream: int, *addresses: int, copies: Copies = ()
    ) -> None:
        self.launches = tuple(launches)  # and with them the memory of their parameters
        self.copies = copies
        places = [
            [(of, *place) for of, one in enumerate(launches) for place in one.values.places(at)]
            for at in addresses
        ]
        if any(len(found) != 1 for found in places):
            raise ValueError(f"the addresses stand in {[len(found) for found in places]} places")
        self._places, self._stream = tuple(place for (place,) in places), stream
        # By the addresses that each was told last, the oldest first. Memory that is let go and
        # asked for again has few addresses: a loop that holds one outcome until the next has two.
        # Another is made for addresses that come back, `_left` by a way that went on to others.
        self._ways = {addresses: self._way()}
        self._left: tuple[int, ...] | None = None
        self._refused: _Way | None = None  # it may not know what it was told

    def queue(self, *addresses: int) -> None:
        """Queue all of them; RuntimeError where the driver refuses."""
        way = self._ways.get(addresses)
        calls = self._tell(addresses) if way is None else way.queues
        for call in calls:
            if status := call():
                cuda.insist(status, self.launches[0].kernel, *calls)
                break
        if way is None:
            assert self._refused is not None
            self._ways[addresses], self._refused = self._refused, None

    def _tell(self, addresses: tuple[int, ...]) -> list[Callable[[], int]]:
        """The calls that queue them with these addresses, by a way that is `_refused` until then.

        A kernel of which nothing has changed is not told anew: that takes the host as long as it
        takes to queue half of a graph.
        """
        stale = set(range(len(self.launches)))
        comes_back = self._captured and addresses == self._left and len(self._ways) < MOST_GRAPHS
        if self._refused is None and not comes_back:
            stale = self._leave(addresses)
        for (_, words, at), address in zip(self._places, addresses, strict=True):
            words[at] = address
        if self._refused is None:
            try:
                self._refused = self._way()  # which is told by being made
            except RuntimeError:  # for want of memory, or of a context: there is another way
                stale = self._leave(addresses)
            else:
                return self._refused.queues
        assert self._refused is not None
        return [
            *(self._refused.tells[of] for of in stale if self._refused.tells),
            *self._refused.queues,
        ]

    def _leave(self, addresses: tuple[int, ...]) -> set[int]:
        """Take the oldest way for these addresses; which launches it is to be told of."""
        oldest = next(iter(self._ways))
        # An interrupt may come between any two of these.
        self._refused = self._ways[oldest]
        del self._ways[oldest]
        self._left = oldest
        told = zip(self._places, oldest, addresses, strict=True)
        return {of for (of, *_), before, now in told if before != now}

    @property
    def _captured(self) -> bool:
        """Whether they are a graph."""
        return len(self.launches) > 1 or bool(self.copies)

    def _way(self) -> _Way:
        if not self._captured:
            return _Way(None, (), [self.launches[0].on(self._stream)])
        graph = Graph(self.launches, self.copies)
        tells, queue = graph.calls(self._stream)
        return _Way(graph, tells, [queue])


class Graph:
    """A CUDA graph of launches, one after another as they would be queued on a stream.

    copies: (to, from, bytes), beside each other, before the first of them.
    """

    def __init__(self, launches: Sequence[Ready], copies: Copies = ()) -> None:
        from cuda.bindings import driver

        done = cuda.done
        graph = done(driver.cuGraphCreate(0))
        context = launches[0].kernel.context
        before = [
            done(driver.cuGraphAddMemcpyNode(graph, None, 0, _copy(*each), context))
            for each in copies
        ]
        self._nodes: list[tuple[Any, Any]] = []
        for launch in launches:
            told = launch.node()
            node = done(driver.cuGraphAddKernelNode(graph, None, 0, told))
            # A copy does not tell the first kernel when it may begin.
            edges = [_edge(launch.overlap and bool(self._nodes))] * len(before)
            done(
                driver.cuGraphAddDependencies(
                    graph, before, [node] * len(before), edges, len(before)
                )
            )
            self._nodes.append((node, told))
            before = [node]
        self._ready = done(driver.cuGraphInstantiate(graph, 0))
        # The nodes, by which parameters are told, belong to the graph.
        for destroy, what in (
            (driver.cuGraphExecDestroy, self._ready),
            (driver.cuGraphDestroy, graph),
        ):
            weakref.finalize(self, destroy, what).atexit = False

    def calls(self, stream: int) -> tuple[tuple[Callable[[], int], ...], Callable[[], int]]:
        """What tells each kernel its parameters, and what queues all; each returns the status."""
        library, pointer = cuda.library(), ctypes.c_void_p
        ready = pointer(int(self._ready))
        tell = library.cuGraphExecKernelNodeSetParams_v2
        tells = tuple(
            functools.partial(tell, ready, pointer(int(node)), pointer(int(told.getPtr())))
            for node, told in self._nodes
        )
        return tells, functools.partial(library.cuGraphLaunch, ready, pointer(stream))


def _copy(to: int, from_: int, size: int) -> Any:
    """The driver's description of a copy of so many bytes within the device."""
    from cuda.bindings import driver

    made = driver.CUDA_MEMCPY3D()
    made.srcMemoryType = made.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    made.srcDevice, made.dstDevice = from_, to
    made.WidthInBytes, made.Height, made.Depth = size, 1, 1
    return made


def _edge(overlaps: bool) -> Any:
    """From a kernel to the next, which may or may not begin before it has ended."""
    from cuda.bindings import driver

    edge = driver.CUgraphEdgeData()
    if overlaps:
        edge.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        edge.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    return edge
