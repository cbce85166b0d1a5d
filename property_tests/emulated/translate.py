"""CUDA C++ as C++: inline PTX becomes calls of `device.h`."""

from __future__ import annotations

import re

# What each PTX text does, with %i as its operands. As in the sources, but for space.
PTX = {
    "": "",
    "griddepcontrol.launch_dependents;": "",
    "griddepcontrol.wait;": "emulated::emulated_wait_for_previous()",
    "prefetch.global.L2 [%0];": "emulated::emulated_prefetch(%0)",
    "mov.u32 %0, %%cluster_ctarank;": "%0 = emulated_rank",
    # In no kernel by itself: what test_emulated_few.py puts in the place of the next.
    "barrier.cluster.arrive.relaxed.aligned;":
        "emulated::emulated_cluster_arrive(false, __builtin_LINE())",
    "barrier.cluster.arrive.release.aligned;":
        "emulated::emulated_cluster_arrive(true, __builtin_LINE())",
    "barrier.cluster.wait.acquire.aligned;": "emulated::emulated_cluster_wait(__builtin_LINE())",
    "mapa.shared::cluster.u32 %0, %0, %1;": "%0 = emulated::emulated_map(%0, %1)",
    "red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;":
        "emulated::emulated_add(%0, %1, false)",
    "red.relaxed.cta.shared::cta.add.u32 [%0], %1;": "emulated::emulated_add(%0, %1, true)",
    "{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.shared.v4.u32 [%0], {%1, %2, %3, %4};}":
        "if (%5) emulated::put(%0, {%1, %2, %3, %4})",
    "{.reg .pred p; setp.ne.u32 p, %5, 0; "
    "@p ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}":
        "emulated::load(%0, %1, %2, %3, %5 ? %4 : nullptr)",
    "{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}":
        "if (%5) emulated::load(%0, %1, %2, %3, %4)",
    "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
    "mov.u32 %3, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}":
        "if (%5) emulated::load(%0, %1, %2, %3, %4); else %0 = %1 = %2 = %3 = 0",
    "mbarrier.init.shared.b64 [%0], %1;": "emulated::emulated_barrier_init(%0, %1)",
    "{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}":
        "emulated::emulated_barrier_arrive(%0, true)",
    "{.reg .pred done; again: mbarrier.test_wait.parity.shared.b64 done, [%0], %1; "
    "@!done bra again; }": "emulated::emulated_barrier_wait(%0, %1)",
    "mbarrier.init.shared::cta.b64 [%0], %1;": "emulated::emulated_barrier_init(%0, %1)",
    "fence.mbarrier_init.release.cluster;": "emulated::emulated_barrier_fence()",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;":
        "emulated::emulated_barrier_expect(%0, %1)",
    "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
    "mbarrier.arrive.shared::cluster.b64 _, [remote]; }":
        "emulated::emulated_barrier_arrive(emulated::emulated_map(%0, %1), false)",
    "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
    "@!done bra again; }": "emulated::emulated_barrier_wait(%0, %1)",
    "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;":
        "emulated::emulated_cluster_arrive(true, __builtin_LINE()), "
        "emulated::emulated_cluster_wait(__builtin_LINE())",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%0], [%1, {%2, %3}], [%4];": "emulated::emulated_load(%0, %1, %2, %3, %4, 0)",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;":
        "emulated::emulated_load(%0, %1, %2, %3, %4, %5)",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;":
        "emulated::emulated_cached(%6); emulated::emulated_load(%0, %1, %2, %3, %4, %5)",
    **{
        f"createpolicy.fractional.L2::{kept}.b64 %0, 1.0;":
            f"%0 = emulated::emulated_policy({first})"
        for kept, first in (("evict_first", "true"), ("evict_normal", "false"))
    },
    "bar.sync %0, 128;": "emulated::emulated_bar_sync(%0, 128, __builtin_LINE())",
    "wgmma.fence.sync.aligned;": "emulated::emulated_wgmma_fence()",
    "wgmma.commit_group.sync.aligned;": "emulated::emulated_wgmma_commit()",
    "wgmma.wait_group.sync.aligned 0;": "emulated::emulated_wgmma_wait(0)",
    "wgmma.wait_group.sync.aligned 1;": "emulated::emulated_wgmma_wait(1)",
    "setmaxnreg.dec.sync.aligned.u32 40;": "",
    "setmaxnreg.inc.sync.aligned.u32 232;": "",
    **{
        f"setmaxnreg.{way}.sync.aligned.u32 %0;":
            "static_assert(%0 % 8 == 0 && %0 >= 24 && %0 <= 256, \"setmaxnreg\")"
        for way in ("dec", "inc")
    },
    **{
        f"stmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 [%0], {{%1, %2, %3, %4}};":
            "emulated::emulated_stmatrix(%0, {%1, %2, %3, %4}, "
            f"{'true' if turned else 'false'}, __builtin_LINE())"
        for turned in ("", ".trans")
    },
    "{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1 + %3], 16; }":
        "if (%2) emulated::emulated_copy(%0, (const char *)(%1) + %3, 16)",
    "cp.async.commit_group;": "emulated::emulated_commit()",
    **{
        f"cp.async.wait_group {n};": f"emulated::emulated_wait_copies({n})" for n in (0, 1)
    },
    "ex2.approx.ftz.f32 %0, %1;": "%0 = emulated::flushed(exp2f(emulated::flushed(%1)))",
    "rcp.approx.ftz.f32 %0, %1;": "%0 = emulated::flushed(1.0f / emulated::flushed(%1))",
    "{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}": "%0 = emulated::half_at(%1, 0)",
    "{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}": "%0 = emulated::half_at(%1, 16)",
    **{
        f"mma.sync.aligned.{shape} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, "
        "{%0, %1, %2, %3};":
            "int sum_[4] = {%0, %1, %2, %3}; "
            f"emulated::emulated_mma_{does}(sum_, {{{{%4, %5, %6, %7}}, {{%8, %9}}}}, "
            "__builtin_LINE()); "
            "%0 = sum_[0], %1 = sum_[1], %2 = sum_[2], %3 = sum_[3]"
        for shape, does in (
            ("m16n8k256.row.col.s32.b1.b1.s32.and.popc", "and_popc"),
            ("m16n8k32.row.col.s32.u8.s8.s32", "u8_s8"),
        )
    },
    **{
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};":
            "float sum_[4] = {%10, %10, %10, %10}; "
            f"emulated::emulated_mma_{kind}(sum_, {{{{%4, %5, %6, %7}}, {{%8, %9}}}}, "
            "__builtin_LINE()); "
            "%0 = sum_[0], %1 = sum_[1], %2 = sum_[2], %3 = sum_[3]"
        for kind in ("f16", "bf16")
    },
    **{
        f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};":
            "float sum_[4] = {%0, %1, %2, %3}; "
            f"emulated::emulated_mma_{kind}(sum_, {{{{%4, %5, 0, 0}}, {{%6, 0}}}}, "
            "__builtin_LINE()); "
            "%0 = sum_[0], %1 = sum_[1], %2 = sum_[2], %3 = sum_[3]"
        for kind in ("f16", "bf16")
    },
    "prmt.b32 %0, %1, %1, %2;": "%0 = __byte_perm(%1, %1, %2)",
    "cvt.f32.f16 %0, %1;": "%0 = emulated::half_at(%1, 0)",
    "cvt.rn.f16.f32 %0, %1;": "%0 = emulated::half_of(%1)",
    "cvt.rn.bf16.f32 %0, %1;": "%0 = emulated::bfloat_of(%1)",
    "cvt.rn.f16x2.f32 %0, %1, %2;":
        "%0 = emulated::half_of(%1) << 16 | emulated::half_of(%2)",
    "cvt.rn.bf16x2.f32 %0, %1, %2;":
        "%0 = emulated::bfloat_of(%1) << 16 | emulated::bfloat_of(%2)",
}  # fmt: skip


def _flat(ptx: str) -> str:
    return re.sub(r"\s*([{};:,])\s*", r"\1", re.sub(r"\s+", " ", ptx).strip())


MEANING = {_flat(ptx): done for ptx, done in PTX.items()}

# A product of a warpgroup: columns, kind, accumulators, descriptors, a sparse one's metadata, and
# what says whether it adds. All lanes have metadata of int8: there is one selector, 0.
WGMMA = re.compile(
    r"\{\.reg \.pred p;setp\.ne\.b32 p,%(?P<add>\d+),0;"
    r"wgmma\.mma_async(?P<sparse>\.sp)?\.sync\.aligned\.m64n(?P<columns>\d+)(?P<kind>k[\w.]+)"
    r" ?\{(?P<names>[%\d,]+)\},%(?P<a>\d+),%(?P<b>\d+),(?(sparse)(?P<metadata>%\d+),0,)p;\}"
)
# What hopper.h calls the entries of its operands.
ENTRIES = {"k32.s32.s8.s8": 0, "k256.s32.b1.b1.and.popc": 1, ".spk64.s32.s8.s8": 2}


def cluster(text: str) -> str:
    """How many blocks a cluster of the kernel has, as C++."""
    found = re.search(r"__cluster_dims__\(([^,]*), 1, 1\)", text)
    return found[1] if found else "1"


def translated(text: str) -> str:
    """A kernel's source, preprocessed, as C++; ValueError for PTX that is not in `PTX`.

    And for calls of the C library whose accesses of memory nobody would see.
    """
    if unseen := re.search(r"\bmem(?:cpy|move|set)\b", text):
        raise ValueError(f"the emulator does not see what {unseen[0]} reads and writes")
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1 *const \2 = emulated::dynamic_shared<\1>();",
        text,
    )
    made, at = [], 0
    for found in re.finditer(r"\basm(?: volatile)?\s*\(", text):
        end = _closing(text, found.end())
        inside = re.sub(r"(?m)^#.*\n", "", text[found.end() : end])  # what tells of a line
        made += [text[at : found.start()], _call(inside), "\n" * inside.count("\n")]
        at = end + 1
    return "".join([*made, text[at:]])


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that is open at `at` closes; quotes aside."""
    depth, quoted = 1, False
    while depth:
        c = text[at]
        if c == '"':
            quoted = not quoted
        elif not quoted:
            depth += (c == "(") - (c == ")")
        at += 1
    return at - 1


def _call(inside: str) -> str:
    """The statement for what stands between the parentheses of an asm."""
    said = re.match(r'(?:\s*"(?:[^"\\]|\\.)*")+', inside)
    assert said is not None
    ptx = _flat("".join(re.findall(r'"((?:[^"\\]|\\.)*)"', said[0])).replace("\\n", " "))
    operands, at = [], said.end()
    while found := re.compile(r'\s*[:,]*\s*"([^"]*)"\s*(\()?').match(inside, at):
        at = found.end()
        if found[2]:
            end = _closing(inside, at)
            operands.append(inside[at:end].strip())
            at = end + 1
    meaning = MEANING.get(ptx) if ptx in MEANING else _product(ptx, operands)
    if meaning is None:
        raise ValueError(f"the emulator has no such PTX: {ptx}")
    return (
        "do { " + re.sub(r"%(\d+)", lambda n: f"({operands[int(n[1])]})", meaning) + "; } while (0)"
    )


def _product(ptx: str, operands: list[str]) -> str | None:
    """The meaning of a `wgmma` whose accumulators are an array, in its order; None of another."""
    if not (found := WGMMA.fullmatch(ptx)):
        return None
    entries = ENTRIES.get((found["sparse"] or "") + found["kind"])
    if entries is None:
        return None
    count = int(found["columns"]) // 2
    if found["names"] != ",".join(f"%{i}" for i in range(count)):
        return None
    places = [re.fullmatch(r"(\w+)\[([\d +]+)\]", operand) for operand in operands[:count]]
    for i, place in enumerate(places):
        if not place or place[1] != places[0][1] or sum(map(int, place[2].split("+"))) != i:
            return None
    return (
        f"emulated::emulated_wgmma(&%0, {found['columns']}, {entries}, %{found['a']}, "
        f"%{found['b']}, {found['metadata'] or 0}, %{found['add']}, __builtin_LINE())"
    )
