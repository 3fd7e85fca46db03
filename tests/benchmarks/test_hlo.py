"""Collectives in compiled programs: kinds, bytes, repetitions, conditional execution."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from benchmarks.common.hlo import Collective, collectives


GPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64,32]) -> bf16[8,32] {
  ROOT %scattered = bf16[8,32]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%refresh_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %permuted = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %inner = (s32[], f32[4]) while(%t), condition=%layers_end, body=%layers_body, \
backend_config={"known_trip_count":{"n":"17"}}
}

%refresh_end (t: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%layers_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-gather-start = (f32[16,2]{1,0}, f32[64,2]{1,0}) all-gather-start(%w), \
replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done = f32[64,2]{1,0} all-gather-done(%all-gather-start)
  %async-start = ((bf16[64,32]), bf16[8,32]) async-start(%g), calls=%wrapped
  %async-done = bf16[8,32]{1,0} async-done(%async-start)
}

%layers_end (t: (s32[], f32[4])) -> pred[] {
  ROOT %less.1 = pred[] compare(%i, %n), direction=LT
}

%keep (t: f32[4]) -> f32[4] {
  ROOT %t = f32[4]{0} parameter(0)
}

%root (t: f32[4]) -> f32[4] {
  ROOT %exchanged = (f32[4]{0}, f32[4]{0}) all-to-all(%t, %t), replica_groups={{0,1},{2,3}}
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %reduced = (f32[8]{0}, /*index=1*/bf16[3,5]{1,0:T(8,128)}, pred[]) all-reduce(%p0, %p1, %p2), \
replica_groups={}, to_apply=%add
  %layers = (s32[], f32[4]) while(%t), condition=%layers_end, body=%layers_body, \
backend_config={"known_trip_count":{"n":"24"}}
  %refreshed = (s32[], f32[4]) while(%t), condition=%refresh_end, body=%refresh_body
  ROOT %rooted = f32[4]{0} conditional(%due, %a, %b), branch_computations={%keep, %root}
}
"""


def test_each_collective_is_counted_once_with_its_repetitions():
    gather = Collective("all-gather", [(64, 2)], 512, 4)
    scatter = Collective("reduce-scatter", [(8, 32)], 512, 8)
    assert sorted(collectives(GPU)) == sorted(
        [
            Collective("all-reduce", [(8,), (3, 5), ()], 32 + 30 + 1, 8),
            gather._replace(times=24),
            scatter._replace(times=24),
            gather._replace(times=17, hot=False),
            scatter._replace(times=17, hot=False),
            Collective("collective-permute", [(4,)], 16, 8, hot=False),
            Collective("all-to-all", [(4,), (4,)], 32, 2, hot=False),
        ]
    )


@pytest.mark.parametrize(
    ("kind", "received"),
    [
        ("all-gather", 75),  # three of four parts
        ("reduce-scatter", 300),  # its part, from each of three
        ("all-reduce", 150),  # a quarter from each of three, then the other quarters
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_bytes_received_by_a_device(kind, received):
    assert Collective(kind, [], size=100, group=4).received == received


def test_fused_reduce_scatter_of_tpus():
    """An all-reduce of which each device keeps a slice receives half of an all-reduce's bytes."""
    program = """\
HloModule jit_update, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (p: f32[128,2048]) -> f32[128,256] {
  %all-reduce.20 = f32[128,2048]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = f32[128,256]{1,0} dynamic-slice(%all-reduce.20, %zero, %start)
}

ENTRY %main (x: f32[128,2048]) -> f32[128,256] {
  ROOT %fusion = f32[128,256]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = collectives(program)
    assert (one.kind, one.hot, one.received) == ("reduce-scatter", True, 128 * 2048 * 4 * 7 / 8)


def test_chained_collective_of_tpus_counts_once():
    """XLA:TPU runs it in parts, beside other products; each part repeats it in the program."""
    program = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p: bf16[16,32]) -> (bf16[16,32], bf16[128,32]) {
  %all-gather.1 = bf16[128,32]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}, \
frontend_attributes={chain_id="5"}
  ROOT %custom-call.1 = (bf16[16,32], bf16[128,32]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%part (p: bf16[16,32], q: bf16[128,32]) -> (f32[64,64], bf16[128,32]) {
  %convolution.1 = f32[64,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %all-gather.2 = bf16[128,32]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}, \
frontend_attributes={chain_id="5"}
  ROOT %tuple = (f32[64,64], bf16[128,32]) tuple(%convolution.1, %all-gather.2)
}

%done (p: bf16[16,32], q: bf16[128,32]) -> bf16[128,32] {
  %all-gather.3 = bf16[128,32]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}, \
frontend_attributes={chain_id="5"}
  ROOT %custom-call.2 = bf16[128,32] custom-call(%p, %q, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%body (t: (s32[])) -> (s32[]) {
  %fusion.2 = (f32[64,64], bf16[128,32]) fusion(%s), kind=kOutput, calls=%part
}

%end (t: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[16,32]) -> bf16[128,32] {
  %async-collective-start = (bf16[16,32], bf16[128,32]) fusion(%x), kind=kCustom, calls=%start
  %products = (s32[]) while(%t), condition=%end, body=%body, \
backend_config={"known_trip_count":{"n":"8"}}
  ROOT %async-collective-done = bf16[128,32] fusion(%s, %q), kind=kCustom, calls=%done
}
"""
    assert collectives(program) == [Collective("all-gather", [(128, 32)], 2 * 128 * 32, 8)]


def test_doctests():
    from benchmarks.common import hlo

    assert doctest.testmod(hlo).failed == 0


def test_scans_multiply_and_loops_of_unknown_length_are_not_hot():
    """FSDP by hand: each of six layers gathers its weight from four devices."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharding = lambda *spec: NamedSharding(mesh, P(*spec))

    def f(weights, x, turns):
        layer = lambda x, w: (jnp.sin(x @ jax.lax.with_sharding_constraint(w, sharding())), None)
        x = jax.lax.scan(layer, x, weights)[0]
        return jax.lax.fori_loop(0, turns, lambda _, x: jnp.cos(x) / x.sum(), x)

    shapes = [(6, 64, 64), np.float32], [(8, 64), np.float32], [(), np.int32]
    placed = (sharding(None, "fsdp"), sharding("data"), sharding())
    f = jax.jit(f, in_shardings=placed, out_shardings=sharding("data"))
    program = f.lower(*[jax.ShapeDtypeStruct(*shape) for shape in shapes]).compile().as_text()
    gather, reduce = collectives(program)
    assert gather[2:] == (64 * 64 * 4, 4, True, 6)
    assert reduce[2:] == (4, 2, False, 1)
