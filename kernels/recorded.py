"""Launches that were recorded, made again with other addresses in the places of some.

Several become one CUDA graph, whose kernels are told their parameters anew before it is queued, if
these have changed: that takes the host at most half of what the launches take. One stays a launch,
which may overlap with the kernel before it.
Source: NVIDIA, CUDA Driver API, graph management.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import cuda

if TYPE_CHECKING:
    from .cuda import Ready


class Again:
    """Recorded launches, at least one, with other addresses.

    stream: on which they are queued. addresses: those that were given, each to one parameter of one
    of the launches. ValueError for one that was not, or to several. Of the thread that made it.
    """

    def __init__(self, launches: Sequence[Ready], stream: int, *addresses: int) -> None:
        self.launches = tuple(launches)  # and with them the memory of their parameters
        places = [
            [(of, *place) for of, one in enumerate(launches) for place in one.values.places(at)]
            for at in addresses
        ]
        if any(len(found) != 1 for found in places):
            raise ValueError(f"the addresses stand in {[len(found) for found in places]} places")
        self._places = tuple(place for (place,) in places)
        self._graph = Graph(self.launches) if len(launches) > 1 else None
        self._tells, self._queue = (
            self._graph.calls(stream) if self._graph else ((), self.launches[0].on(stream))
        )
        self._last = addresses
        self._alone = [self._queue]
        self._stale: set[int] = set()  # launches of which the graph was not told all as it stands

    def queue(self, *addresses: int) -> None:
        """Queue all of them; RuntimeError where the driver refuses."""
        # Memory that is let go and asked for again is mostly the same.
        if addresses != self._last:
            self._take(addresses)
        stale = self._stale
        calls = [*(self._tells[of] for of in stale), self._queue] if stale else self._alone
        for call in calls:
            if status := call():
                cuda.insist(status, self.launches[0].kernel, *calls)
                break
        if stale:
            stale.clear()

    def _take(self, addresses: tuple[int, ...]) -> None:
        for (of, words, at), address in zip(self._places, addresses, strict=True):
            if words[at] != address:
                words[at] = address
                if self._tells:
                    self._stale.add(of)
        self._last = addresses


class Graph:
    """A CUDA graph of launches, one after another as they would be queued on a stream."""

    def __init__(self, launches: Sequence[Ready]) -> None:
        from cuda.bindings import driver

        done = cuda.done
        graph = done(driver.cuGraphCreate(0))
        self._nodes: list[tuple[Any, Any]] = []
        for launch in launches:
            told = launch.node()
            before = [node for node, _ in self._nodes[-1:]]
            node = done(driver.cuGraphAddKernelNode(graph, None, 0, told))
            edges = [_edge(launch.overlap)] * len(before)
            done(
                driver.cuGraphAddDependencies(
                    graph, before, [node] * len(before), edges, len(before)
                )
            )
            self._nodes.append((node, told))
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


def _edge(overlaps: bool) -> Any:
    """From a kernel to the next, which may or may not begin before it has ended."""
    from cuda.bindings import driver

    edge = driver.CUgraphEdgeData()
    if overlaps:
        edge.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        edge.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    return edge
