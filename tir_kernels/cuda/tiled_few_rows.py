"""Decoding with 4-bit weights in the tiled layout: every weight is read once.

A block multiplies a unit of one or more stripes of 16 outputs, then its next unit. Its warps share
the inputs out among themselves, and each streams the tiles of its part of K in rounds of `depth`:

- The words of the next round, be it of the next unit, are on their way into registers, 16 bytes a
  lane: as soon as a tile has been multiplied, its successor is asked for in its place.
- The activations of the warp's part lie in shared memory, where they stay for all units; if there
  is no room, those of the next round are on their way into a ring of two. Either is the warp's
  own: no two warps wait for each other until a unit is summed.
- A tile is four steps of `mma` with the weight as the operand of 16 rows and eight tokens as the
  other. Weights are unpacked to q - z, which is exact; the scale is applied to the fp32 sum of a
  group, and this sum is all that a group costs.

Addresses are cursors that move once a round; what is added within a round is constant and part of
the load instruction. Eight weights a lane take about fourteen instructions in all.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device
from tir_kernels.cuda.activations import Activations
from tir_kernels.cuda.epilogue import Epilogue, Sums, reduce_and_store
from tir_kernels.cuda.few_rows_schedule import TiledFewRows
from tir_kernels.layouts import TILE_K, TILE_N, TILE_WORDS, LinearShape

STEPS = TILE_K // 16  # mma steps in a tile
WORDS, SCALES, ZEROS = range(3)  # cursors


def tiled_few_rows(
    shape: LinearShape, act_dtype: str, schedule: TiledFewRows, epilogue: Epilogue
) -> Any:
    """An inline builder (m, x, (qweight, qzeros, scales), bias, out) for m <= schedule.rows."""
    K, G, tiles, groups = shape.K, shape.group_size, shape.tile_columns, shape.groups
    rows, W, S, D = schedule.rows, schedule.warps, schedule.stripes, schedule.depth
    units, blocks, resident = schedule.units(shape), schedule.blocks, schedule.resident
    share, rounds, stages = schedule.share(shape), schedule.rounds(shape), schedule.stages(shape)
    exact = share * W == tiles and share % D == 0 and K % TILE_K == 0
    group_steps = G // 16
    round_groups = D * TILE_K // G
    stripe_bytes = tiles * TILE_WORDS * 4

    activations = Activations(K, rows, D * TILE_K, stages, exact)
    eights = activations.eights
    seek_activations, copy_round = activations.seek(), activations.copy()
    load_activations = activations.load()
    sums = Sums(rows, W, S, W * stages * activations.stage // 4 if resident else 0)
    stripe_outputs = TILE_N // 2 if epilogue.silu else TILE_N  # that are stored
    shared_floats = schedule.shared(shape) // 4

    multiply, dequantize = device.mma(act_dtype), device.dequantize(act_dtype)
    zero_points = device.zero_points(act_dtype)

    def first_stripe(unit):
        # The last unit is moved back where stripes run out; what two units share is stored twice.
        return T.min(unit * S, shape.tile_rows - S)

    def inside(r, step, first):
        """Whether the warp has the tile of this step of round r, and the input its group."""
        if exact:
            return r < rounds
        k = (first + r * D + step // STEPS) * TILE_K + step % STEPS * 16
        return T.And(r * D + step // STEPS < share, k < K)

    @T.inline
    def seek(unit, first, lane, qweight, qzeros, scales, cursor):
        """Move the cursors of the weight to the warp's first tile of a unit."""
        stripe = T.meta_var(first_stripe(unit))
        group = T.meta_var(first * TILE_K // G)
        cursor[WORDS] = device.global_cursor(T.address_of(qweight[stripe, first, lane * 4]))
        cursor[SCALES] = device.global_cursor(T.address_of(scales[stripe, group, lane // 4 * 2]))
        cursor[ZEROS] = device.global_cursor(T.address_of(qzeros[stripe, group, 0])) + T.Cast(
            "uint64", lane // 4
        )

    @T.inline
    def load_tile(valid, cursor, words, u):
        if valid:
            for s in T.unroll(S):
                device.load_streamed_at(
                    device.registers(words, s, u, 0),
                    cursor[WORDS],
                    s * stripe_bytes + u * TILE_WORDS * 4,
                )

    @T.inline
    def load_group(valid, cursor, scale, zero, p):
        if valid:
            for s in T.unroll(S):
                at = T.meta_var(s * groups + p)
                scale[s, p, 0] = device.load_word_at(cursor[SCALES], at * TILE_N * 2)
                zero[s, p, 0] = device.load_byte_at(cursor[ZEROS], at * 8)

    @T.inline
    def multiply_round(r, ahead, first, cursor, activation, weight, part, total):
        """Multiply a round's tiles, and ask for those of round `ahead` in their place."""
        words, scale, zero = weight
        zeros = T.alloc_buffer((S, 4), "uint32", scope="local")
        a = T.alloc_buffer((4,), "uint32", scope="local")
        b = T.alloc_buffer((eights, 4), "uint32", scope="local")
        factor = T.alloc_buffer((2,), "float32", scope="local")
        for step in T.unroll(D * STEPS):
            p = T.meta_var(step // group_steps)
            if step % group_steps == 0:
                device.clear(part)
                for s in T.unroll(S):
                    # The byte has the zero points of rows g and g + 8: nibbles 0 and 1, 4 and 5
                    # of what they are for, and 2 and 3, 6 and 7.
                    zero_points(device.registers(zeros, s, 0), zero[s, p, 0] * T.uint32(0x00010001))
                    zeros[s, 2] = zeros[s, 0]
                    zeros[s, 3] = zeros[s, 1]
            if step % 2 == 0:
                load_activations(activation, b, r % stages, step)
            for s in T.unroll(S):
                dequantize(
                    device.registers(a, 0),
                    words[s, step // STEPS, step % STEPS],
                    device.registers(zeros, s, 0),
                )
                for e in T.unroll(eights):
                    multiply(
                        device.registers(part, s, e, 0),
                        device.registers(a, 0),
                        device.registers(b, e, step % 2 * 2),
                    )
            if step % STEPS == STEPS - 1:
                # Nothing is exchanged. But the assembler moves no load across this; left to itself
                # it asks for activations so early that registers run out, and for words too late.
                device.sync_warp()
                tile = T.meta_var(step // STEPS)
                load_tile(inside(ahead, tile * STEPS, first), cursor, words, tile)
            if step % group_steps == group_steps - 1:
                for s in T.unroll(S):
                    device.unpack_f16(device.registers(factor, 0), scale[s, p, 0])
                    for e in T.unroll(eights):
                        for i in T.unroll(4):
                            total[s, e, i] = total[s, e, i] + factor[i // 2] * part[s, e, i]
                load_group(inside(ahead, p * group_steps, first), cursor, scale, zero, p)

    @T.inline
    def body(m, x, parameters, bias, out, block, warp, lane):
        qweight, qzeros, scales = parameters
        shared = T.meta_var(device.dynamic_shared(shared_floats, "float32"))
        words = T.alloc_buffer((S, D, 4), "uint32", scope="local")
        scale = T.alloc_buffer((S, round_groups, 1), "uint32", scope="local")
        zero = T.alloc_buffer((S, round_groups, 1), "uint32", scope="local")
        part = T.alloc_buffer((S, eights, 4), "float32", scope="local")
        total = T.alloc_buffer((S, eights, 4), "float32", scope="local")
        cursor = T.alloc_buffer((3,), "uint64", scope="local")
        source = T.alloc_buffer((1,), "uint64", scope="local")
        k = T.alloc_buffer((2,), "int32", scope="local")
        place = T.alloc_buffer((1,), "uint32", scope="local")
        matrices = T.alloc_buffer((eights,), "uint32", scope="local")
        ahead = T.alloc_buffer((1,), "int32", scope="local")
        activation = T.meta_var((source, k, place, matrices))
        first = T.meta_var(warp * share)

        device.clear(words)
        device.clear(scale)
        device.clear(zero)
        seek(block, first, lane, qweight, qzeros, scales, cursor)
        for u in T.unroll(D):
            load_tile(inside(0, u * STEPS, first), cursor, words, u)
        for p in T.unroll(round_groups):
            load_group(inside(0, p * group_steps, first), cursor, scale, zero, p)
        seek_activations(
            activation, m, x, shared, warp, lane,
            first * TILE_K, T.min((first + share) * TILE_K, K),
        )  # fmt: skip
        for r in T.serial(rounds if resident else 1):
            copy_round(activation, m, lane, r)
        if resident:
            device.wait_copies(0)()
            device.sync_warp()

        for n in range(T.ceildiv(units - block, blocks) if blocks < units else 1):
            unit = T.meta_var(block + n * blocks)
            device.clear(total)
            for r in T.serial(rounds, annotations={"disable_unroll": True}):
                if not resident:
                    device.wait_copies(0)()
                    device.sync_warp()
                    if r + 1 < rounds:
                        copy_round(activation, m, lane, (r + 1) % 2)
                cursor[WORDS] = cursor[WORDS] + T.uint64(D * TILE_WORDS * 4)
                cursor[SCALES] = cursor[SCALES] + T.uint64(round_groups * TILE_N * 2)
                cursor[ZEROS] = cursor[ZEROS] + T.uint64(round_groups * 8)
                ahead[0] = r + 1
                if T.And(r + 1 == rounds, unit + blocks < units):
                    seek(unit + blocks, first, lane, qweight, qzeros, scales, cursor)
                    ahead[0] = 0
                multiply_round(
                    r, ahead[0], first, cursor, activation, (words, scale, zero), part, total
                )
            # Before the sums go where activations were, or where the last unit's were.
            T.tvm_storage_sync("shared")
            reduce_and_store(
                epilogue, sums, m, first_stripe(unit) * stripe_outputs, warp, lane,
                shared, total, bias, out,
            )  # fmt: skip

    @T.inline
    def kernel(m, x, parameters, bias, out):
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for warp in T.thread_binding(W, thread="threadIdx.y"):
                for lane in T.thread_binding(32, thread="threadIdx.x"):
                    body(T.Cast("int32", m), x, parameters, bias, out, block, warp, lane)

    return kernel
