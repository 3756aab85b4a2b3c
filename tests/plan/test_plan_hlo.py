"""Collectives read from HLO, in forms that the CPU compiler does not print."""

import pytest

from olmoe_jax.plan.collectives import Collective, communication

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}"


def module(entry: str, before: str = "") -> str:
    """Returns a module whose entry has an f32[8,16] %x, a bf16[4] %y and these lines."""
    return (
        f"{HEADER}{before}\n"
        "ENTRY %main.1_spmd (x: f32[8,16], y: bf16[4]) -> f32[] {\n"
        "  %x = f32[8,16]{1,0:T(8,128)} parameter(0)\n"
        "  %y = bf16[4]{0:T(128)(2,1)} parameter(1)\n"
        f"{entry}\n}}\n"
    )


def found(hlo: str) -> dict[tuple[str, str], tuple[int, int, float]]:
    result = communication(hlo)
    assert result.exact
    return {(c.kind, c.dtype): (c.count, c.bytes, c.wire_bytes) for c in result.collectives}


@pytest.mark.parametrize(
    ("opcode", "size", "sent"),
    [
        ("all-gather", 8 * 512, 7 * 512),
        ("reduce-scatter", 512, 448),
        ("all-reduce", 512, 2 * 448),
        ("all-to-all", 512, 448),
    ],
)
def test_bytes_of_each_kind(opcode, size, sent):
    line = f"  ROOT %c = f32[1]{{0}} {opcode}(%x), channel_id=1, {GROUPS}, dimensions={{0}}"
    assert found(module(line)) == {(opcode, "f32"): (1, size, sent)}


def test_permute_sends_its_operand():
    pairs = "source_target_pairs={{0,1},{1,0}}"
    line = f"  ROOT %c = f32[8,16]{{1,0}} collective-permute(%x), channel_id=1, {pairs}"
    assert found(module(line)) == {("collective-permute", "f32"): (1, 512, 512)}


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
    ],
)
def test_group_sizes(groups, members):
    line = f"  ROOT %c = f32[1]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}"
    assert found(module(line)) == {("all-gather", "f32"): (1, members * 512, (members - 1) * 512)}


def test_a_group_of_one_sends_nothing():
    line = "  ROOT %c = f32[8,16]{1,0} all-reduce(%x), replica_groups=[8,1]<=[8]"
    assert found(module(line)) == {}


def test_asynchronous_variadic():
    """A collective counts at its start, its operands by dtype."""
    shape = "((f32[8,16]{1,0}, bf16[4]{0}), (f32[64,16]{1,0}, /*index=1*/bf16[32]{0}))"
    lines = (
        f"  %s = {shape} all-gather-start(%x, %y), channel_id=1, {GROUPS}, dimensions={{0}}\n"
        "  ROOT %d = (f32[64,16]{1,0}, bf16[32]{0}) all-gather-done(%s)"
    )
    assert found(module(lines)) == {
        ("all-gather", "f32"): (1, 4096, 3584),
        ("all-gather", "bf16"): (1, 64, 56),
    }


def test_wrapped_in_an_asynchronous_computation():
    """Only async-start counts; async-update and async-done name the computation too."""
    before = (
        "%wrapped (p: f32[8,16]) -> f32[1,16] {\n"
        "  %p = f32[8,16]{1,0} parameter(0)\n"
        f"  ROOT %r = f32[1,16]{{1,0}} reduce-scatter(%p), channel_id=1, {GROUPS}, to_apply=%add\n"
        "}\n"
    )
    shape = "((f32[8,16]{1,0}), f32[1,16]{1,0}, u32[])"
    lines = (
        f"  %s = {shape} async-start(%x), calls=%wrapped\n"
        f"  %u = {shape} async-update(%s), calls=%wrapped\n"
        "  ROOT %d = f32[1,16]{1,0} async-done(%u), calls=%wrapped"
    )
    assert found(module(lines, before)) == {("reduce-scatter", "f32"): (1, 512, 448)}


KERNEL = '  %k = f32[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2"\n'
MATMUL = "  %k = f32[8]{0} fusion(%x), kind=kCustom, calls=%matmul\n"
OTHER = "  %k = f32[8,16]{1,0} add(%x, %x)\n"
GATHER = (
    f"  %s = (f32[8,16]{{1,0}}, f32[64,16]{{1,0}}) all-gather-start(%x), {GROUPS}, "
    "dimensions={0}\n",
    "  ROOT %d = f32[64,16]{1,0} all-gather-done(%s)",
)
WRAPPED = (
    "  %s = ((f32[8,16]{1,0}), f32[1,16]{1,0}, u32[]) async-start(%x), calls=%wrapped\n",
    "  ROOT %d = f32[1,16]{1,0} async-done(%s), calls=%wrapped",
)
COMPUTATIONS = (
    "%matmul (p: f32[8,16]) -> f32[8,8] {\n"
    "  %p = f32[8,16]{1,0} parameter(0)\n"
    "  ROOT %m = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
    "}\n\n"
    "%wrapped (p: f32[8,16]) -> f32[1,16] {\n"
    "  %p = f32[8,16]{1,0} parameter(0)\n"
    f"  ROOT %r = f32[1,16]{{1,0}} reduce-scatter(%p), channel_id=1, {GROUPS}, to_apply=%add\n"
    "}\n"
)


@pytest.mark.parametrize("collective", [GATHER, WRAPPED], ids=["gather", "wrapped"])
@pytest.mark.parametrize(
    ("before", "beside", "hidden"),
    [("", KERNEL, True), ("", MATMUL, True), ("", OTHER, False), (KERNEL, "", False)],
    ids=["kernel", "matmul", "no kernel", "kernel before"],
)
def test_what_a_kernel_hides(collective, before, beside, hidden):
    start, done = collective
    result = communication(module(before + start + beside + done, COMPUTATIONS))
    assert result.total("hidden_bytes") == hidden * result.total("bytes")
    assert result.total("exposed_wire_bytes") == (not hidden) * result.total("wire_bytes")


def test_a_chain_of_fusions_is_one_collective():
    """A TPU's compiler puts the parts of a collective into the fusions before and after it."""
    part = (
        "%fused.{0} (p: f32[8,16]) -> f32[64,16] {{\n"
        "  %p = f32[8,16]{{1,0}} parameter(0)\n"
        "  ROOT %g.{0} = f32[64,16]{{1,0}} all-gather(%p), channel_id=3, "
        "replica_groups=mesh['axis_0'=8] {{'axis_0'}}, "
        'frontend_attributes={{chain_id="{1}"}}\n}}\n'
    )
    before = "\n".join(part.format(*ids) for ids in ((0, 0), (1, 0), (2, 0), (3, 1)))
    lines = "\n".join(
        f"  %f.{i} = f32[64,16]{{1,0}} fusion(%x), kind=kCustom, calls=%fused.{i}" for i in range(4)
    )
    assert found(module(lines, before)) == {("all-gather", "f32"): (2, 8192, 7168)}


def test_fused_all_reduce_and_slice_is_a_reduce_scatter():
    before = (
        "%all-reduce-scatter.1 (p: f32[8,16]) -> f32[1,16] {\n"
        "  %p = f32[8,16]{1,0} parameter(0)\n"
        f"  %a = f32[8,16]{{1,0}} all-reduce(%p), channel_id=1, {GROUPS}, to_apply=%add\n"
        "}\n"
    )
    line = "  ROOT %f = f32[1,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    assert found(module(line, before)) == {("reduce-scatter", "f32"): (1, 512, 448)}


BODY = (
    "%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{\n"
    "  %p = (s32[], f32[8,16]{{1,0}}) parameter(0)\n"
    "  %v = f32[8,16]{{1,0}} get-tuple-element(%p), index=1\n"
    "  %r = f32[8,16]{{1,0}} all-reduce(%v), channel_id=1, {groups}, to_apply=%add\n"
    "}}\n\n"
    "%condition (p: (s32[], f32[8,16])) -> pred[] {{\n"
    "  %p = (s32[], f32[8,16]{{1,0}}) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%p), index=0\n"
    "  %n = s32[] {limit}\n"
    "  ROOT %c = pred[] compare(%i, %n), direction=LT\n"
    "}}\n"
)
WHILE = "  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%condition, body=%body"


@pytest.mark.parametrize(
    ("limit", "attribute", "times"),
    [
        ("constant(5)", "", 5),
        ("get-tuple-element(%p), index=2", ', backend_config={"known_trip_count":{"n":"6"}}', 6),
    ],
)
def test_loops(limit, attribute, times):
    hlo = module(WHILE + attribute, BODY.format(groups=GROUPS, limit=limit))
    assert found(hlo) == {("all-reduce", "f32"): (times, times * 512, times * 896)}


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    limit = "get-tuple-element(%p), index=2"
    result = communication(module(WHILE, BODY.format(groups=GROUPS, limit=limit)))
    assert result.collectives == (Collective("all-reduce", "f32", 1, 512, 896.0, 0, 896.0),)
    assert not result.exact
