"""Thread blocks of a cluster in the emulator: shared memory of each, and what orders accesses."""

from __future__ import annotations

import pytest
import torch

from property_tests import emulated
from quest.kernels import cuda

# Each thread adds its block's rank plus 1 to one of the next block's 64 sums.
SUMS = r"""
typedef unsigned int u32;
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) sums(int *out) {
  extern __shared__ int held[];
  __shared__ int kept[64];
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  held[threadIdx.x] = kept[threadIdx.x] = 100 * rank;
  ARRIVE; WAIT;
  u32 at = __cvta_generic_to_shared(held + threadIdx.x);
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"((rank + 1) % CLUSTER));
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(at), "r"(rank + 1) : "memory");
  ARRIVE; WAIT;
  out[blockIdx.x * 64 + threadIdx.x] = held[threadIdx.x] + (kept[threadIdx.x] == 100 * rank);
}
"""  # noqa: E501
RELAXED = 'asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory")'
ARRIVE = 'asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory")'
WAIT = 'asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory")'


def _run(text: str, cluster: int = 4) -> torch.Tensor:
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    emulator = emulated.Emulator()
    for name, said in (("RELAXED", RELAXED), ("ARRIVE", ARRIVE), ("WAIT", WAIT)):
        text = text.replace(name, said)
    emulator.text["sums"] = text
    out = torch.zeros(3 * cluster, 64, dtype=torch.int32)
    code = emulator.compile_("sums", "", {"CLUSTER": cluster})
    kernel = emulator.load(code, "sums", None, threads=64, shared=256, layout="P")
    kernel.launch(3 * cluster, cuda.pointer(out))
    return out


def test_each_block_has_memory_of_its_own() -> None:
    """Others reach it by its rank."""
    for cluster in (1, 2, 4):
        ranks = torch.arange(cluster)
        expected = 100 * ranks + (ranks - 1) % cluster + 1 + 1
        assert torch.equal(_run(SUMS, cluster), expected.repeat(3)[:, None].expand(-1, 64).int())


@pytest.mark.parametrize(
    ("number", "lost", "instead", "told"),
    [
        (1, "ARRIVE; WAIT;", "", "another block, which may not have begun"),
        (2, "ARRIVE; WAIT;", "", "a race"),
        (1, "WAIT;", "", "another block, which may not have begun"),
        (1, "WAIT;", "ARRIVE;", "again, and no wait before it"),
        (2, "WAIT;", "", "a race"),
        (1, "ARRIVE;", "", "no arrive before it"),
        (1, "ARRIVE;", "RELAXED;", "a race"),
        (2, "ARRIVE;", "RELAXED;", "a race"),
        (2, "ARRIVE; WAIT;", "__syncthreads();", "a race"),
    ],
)
def test_what_a_cluster_lacks(number: int, lost: str, instead: str, told: str) -> None:
    parts = SUMS.split(lost)
    text = lost.join(parts[:number]) + instead + lost.join(parts[number:])
    with pytest.raises(emulated.Fault, match=told):
        _run(text)


def test_a_block_that_ends_too_early() -> None:
    """Another one still adds to its shared memory."""
    early = SUMS.replace("ARRIVE; WAIT;\n  out", "if (rank == 0) return;\n  ARRIVE; WAIT;\n  out")
    with pytest.raises(emulated.Fault, match=r"its block ends|has ended"):
        _run(early)


# Each block writes in its own place, and in the next one's.
BESIDE = r"""
extern "C" __global__ void beside(int *out) {
  out[blockIdx.x] = blockIdx.x;
  if (blockIdx.x + 1 < gridDim.x) out[blockIdx.x + 1] = 77;
}
"""


# A thread of block 1 asks something of block 0's shared memory; one of both comes late to that.
LATE = r"""
typedef unsigned int u32;
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) sums(int *out) {
  extern __shared__ int held[];
  __shared__ unsigned long long bar;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  u32 at = __cvta_generic_to_shared(held);
  const u32 first = __cvta_generic_to_shared(&bar);
  if (threadIdx.x == 0) {
    held[0] = 0;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(first), "r"(2));
  }
  ARRIVE; WAIT;
  for (int i = 0; rank == COMES && i < 60; i++) __syncthreads();
  if (rank == 1 && threadIdx.x == 0) {
    ASKS
  }
}
"""
ADDS = r"""
asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(0));
asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(at), "r"(1) : "memory");
"""
ARRIVES = r"""
asm volatile("{.reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n "
             "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(first), "r"(0));
"""


def test_a_wait_tells_nothing_of_the_next_arrivals() -> None:
    """Block 0 comes late to its wait; block 1 has added, and arrived again, by then."""
    head, tail = LATE.split("  ARRIVE; WAIT;\n")
    late = tail.replace("COMES", "0").partition("  if (rank == 1")[0]
    text = head + "ARRIVE;" + late + "WAIT;\nif (rank == 1 && threadIdx.x == 0) {" + ADDS + "}\n"
    text += "ARRIVED if (rank == 0) out[threadIdx.x] = held[0];\nREST WAIT;\n}"
    # The first arrival is behind what block 0 writes: only what block 1 adds is in no order.
    ordered = text.replace("ARRIVED", "ARRIVE; WAIT;").replace("REST", "ARRIVE;")
    _run(ordered, 2)
    racing = "if (rank == 1) {{ {} }} else {{ {} }}".format("ARRIVE;", "")
    text = text.replace("ARRIVED", racing).replace("REST", "if (rank == 0) { ARRIVE; }")
    with pytest.raises(emulated.Fault, match="a race"):
        _run(text, 2)


@pytest.mark.parametrize("asks", [ADDS, ARRIVES], ids=["adds", "arrives"])
@pytest.mark.parametrize(
    ("comes", "told"), [(0, "its block ends, whose shared memory thread 0"), (1, "has ended")]
)
def test_who_asks_before_and_after_a_block_ends(comes: int, told: str, asks: str) -> None:
    with pytest.raises(emulated.Fault, match=told):
        _run(LATE.replace("COMES", str(comes)).replace("ASKS", asks), 2)


def test_what_is_written_in_another_s_place_stays_in_one_of_two_launches() -> None:
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    emulator, out, made = emulated.Emulator(), torch.zeros(3, dtype=torch.int32), []
    emulator.text["beside"], emulator.runs = BESIDE, 2
    code = emulator.compile_("beside", "", {})
    kernel = emulator.load(code, "beside", None, threads=32, shared=0, layout="P")
    for _ in range(2):
        kernel.launch(3, cuda.pointer(out))
        made.append(out.tolist())
    assert made == [[0, 1, 2], [0, 77, 77]]
