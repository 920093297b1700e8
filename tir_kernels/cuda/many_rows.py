"""Many rows (small batches and prefill) on tensor cores.

out^T = W x^T: the weight is the operand of 16 rows of mma.sync.m16n8k16, the activations that of
eight columns, sums are fp32. Both come through shared memory in a ring of stages that cp.async
fills; a stage holds the inputs of one round, a tile of 64 for each warp along them. In a round
every warp waits for its copies, all meet, ask for the round that goes into the place of the last
one, and multiply. What makes weights fragments is the weight's business (`Weight`).

On Hopper a warpgroup's products are asynchronous and read activations from shared memory
themselves: while the tensor cores are at one step of 16 inputs, the warps dequantize the next. So
the last step of a round is still under way when the next round begins, and the place that is free
is one further back.

Tokens beyond m and outputs beyond N are not copied: what lies in their place reaches no other row
or column of a product, and nobody stores it. Inputs beyond K are zeros in both operands.
"""

from __future__ import annotations

from typing import Any, Protocol

from tir_kernels._tvm import T
from tir_kernels.cuda import device, device_gemm, split_k, wgmma
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.shared_plan import SharedPlan, Staged
from tir_kernels.cuda.staging import ASYNC, LOAD, STORE
from tir_kernels.cuda.tile import ROW, STEPS, ManyRows, unrolled
from tir_kernels.layouts import TILE_K


class Weight(Staged, Protocol):
    """How a kind of weight gets into shared memory and from there into fragments.

    The methods return inlines. parameters: the buffers of the weight; cursors, registers: local
    variables of a thread, uint64 and uint32, as many as the properties say.
    """

    @property
    def copies(self) -> int:
        """Of a thread and round."""

    @property
    def cursors(self) -> int: ...
    @property
    def registers(self) -> int: ...

    def start(self) -> Any:
        """(parameters, cursors, block, thread): points the cursors at the first inputs."""

    def copy(self) -> Any:
        """(move, first, buffer, stage, cursors, block, thread, tile, last).

        Copies the round from `tile` on to a stage (a cursor); tiles from `last` on, unless that is
        None, are zeros. first and buffer are for the move (`staging.Move`).
        """

    def read(self) -> Any:
        """(registers, stage, scratch, warp_n, warp_k, lane, thread): begins a round.

        All warps of a block are there. stage, scratch: cursors.
        """

    def fragment(self) -> Any:
        """(a, first, registers, stage, warp_n, warp_k, lane, step, s): a step of stripe s.

        Into a[first + 4 s ..].
        """


def many_rows(
    weight: Weight,
    K: int,
    act_dtype: str,
    epilogue: Epilogue,
    *,
    resident: int,
    asynchronous: bool = True,
) -> Any:
    """An inline builder (m, x [m, K], parameters, bias [N] or None, out) for any m > 0.

    resident: blocks that a multiprocessor shall hold, which limits the registers of a thread.
    asynchronous: see `many_rows_block`.
    """
    schedule = weight.schedule
    body = many_rows_block(weight, K, act_dtype, epilogue, asynchronous=asynchronous)
    blocks = -(-epilogue.N // schedule.outputs)

    @T.inline
    def kernel(m, x, parameters, bias, out):
        count = T.meta_var(T.Cast("int32", m))
        token_blocks = T.meta_var(_token_blocks(schedule, count))
        splits = T.meta_var(_splits(schedule, K, epilogue.N, count))
        # Token blocks first: blocks that run at the same time share weights and activations.
        for token_block in T.thread_binding(token_blocks, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for split in T.thread_binding(splits, thread="blockIdx.z"):
                    for warp in T.thread_binding(schedule.warps, thread="threadIdx.y"):
                        for lane in T.thread_binding(32, thread="threadIdx.x"):
                            with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", resident):
                                body(
                                    count, x, parameters, bias, out,
                                    token_block, block, split, warp, lane,
                                )  # fmt: skip

    return kernel


def many_rows_block(
    weight: Weight, K: int, act_dtype: str, epilogue: Epilogue, *, asynchronous: bool = True
) -> Any:
    """One block of it: (m, x, parameters, bias, out, token_block, block, split, warp, lane).

    Without `asynchronous` (before sm_80), copies go through registers, and there are two stages.
    """
    schedule, plan = weight.schedule, SharedPlan(weight, K, epilogue, asynchronous)
    rows, stages, ahead, alignment = plan.rows, plan.stages, plan.ahead, plan.alignment
    WN, WM, WK = schedule.warps_n, schedule.warps_m, schedule.warps_k
    SN, TM, BM = schedule.warp_stripes, schedule.warp_tokens, schedule.tokens
    tiles = -(-K // TILE_K)
    exact = K % (TILE_K * WK) == 0
    blocks = -(-epilogue.N // schedule.outputs)
    most_splits = schedule.most_splits(K, epilogue.N)
    eights = TM // 8
    fragments = SN * eights
    handed = WN * WM * fragments * 512  # bytes of sums of warps at one place along the inputs
    through_registers = 1 if asynchronous else 4 * (rows.copies + weight.copies)

    copy_rows, store_tile = rows.copier(), plan.store.store()
    start_weight, copy_weight = weight.start(), weight.copy()
    read_weight, load_fragment = weight.read(), weight.fragment()
    multiply = device.mma(act_dtype)
    multiply_async = wgmma.product(act_dtype, BM) if schedule.wgmma else None

    @T.inline
    def add_warps(sums, shared, warp, lane):
        """Sums of warps along the inputs go to the first of them."""
        slot = T.meta_var(shared + T.Cast("uint32", warp % (WN * WM) * fragments * 512 + lane * 16))
        T.tvm_storage_sync("shared")
        if warp >= WN * WM:
            for f in unrolled(fragments):
                device_gemm.store_shared_at(
                    slot + T.Cast("uint32", (warp // (WN * WM) - 1) * handed),
                    f * 512, device.registers(sums, 4 * f),
                )  # fmt: skip
        T.tvm_storage_sync("shared")
        if warp < WN * WM:
            for k in T.unroll(WK - 1):
                for f in unrolled(fragments):
                    device_gemm.add_shared_at(
                        device.registers(sums, 4 * f), slot, k * handed + f * 512
                    )

    def share_of(splits):
        """Tiles of a split: whole rounds."""
        if most_splits == 1:
            return -(-tiles // WK) * WK
        return T.truncdiv(tiles + splits * WK - 1, splits * WK) * WK

    @T.inline
    def body(m, x, parameters, bias, out, token_block, block, split, warp, lane):
        # Of out's type for the last step; until then it is addressed by cursors. (A second buffer
        # on the same memory, by decl_buffer, would make TVM miscount the bytes.)
        shared = T.meta_var(
            device.dynamic_shared(plan.bytes // plan.store.element, epilogue.out_dtype)
        )
        sums = T.alloc_buffer((fragments * 4,), "float32", scope="local")
        a = T.alloc_buffer((2 * SN * 4 if schedule.wgmma else SN * 4,), "uint32", scope="local")
        b = T.alloc_buffer((4,), "uint32", scope="local")
        registers = T.alloc_buffer((weight.registers,), "uint32", scope="local")
        moving = T.alloc_buffer((through_registers,), "uint32", scope="local")
        cursor = T.alloc_buffer((1,), "uint64", scope="local")
        cursors = T.alloc_buffer((weight.cursors,), "uint64", scope="local")
        place = T.alloc_buffer((3,), "uint32", scope="local")

        thread = T.meta_var(warp * 32 + lane)
        warp_n = T.meta_var(warp % WN)
        warp_m = T.meta_var(warp // WN % WM)
        warp_k = T.meta_var(warp // (WN * WM))
        splits = T.meta_var(_splits(schedule, K, epilogue.N, m))
        # The block's part of the inputs: its first tile, and its rounds, none where shares of whole
        # rounds leave nothing for the last splits.
        part = T.alloc_buffer((2,), "int32", scope="local")
        part[0] = split * share_of(splits)
        part[1] = T.truncdiv(T.min(T.max(tiles - part[0], 0), share_of(splits)) + WK - 1, WK)
        first_tile = T.meta_var(part[0])
        rounds = T.meta_var(part[1])
        last = T.meta_var(None if exact else tiles)
        limit = T.meta_var(None if exact else K)
        first_row = T.meta_var(token_block * BM + rows.row(thread))

        # The stages; the thread's first chunk of activations in a stage; the warp's first token.
        place[0] = (
            device.shared_cursor(device.shared_address(shared, 0)) + T.uint32(alignment - 1)
        ) & T.uint32(2**32 - alignment)
        place[1] = place[0] + T.Cast("uint32", rows.shared_offset(thread))
        place[2] = place[0] + T.Cast(
            "uint32",
            (warp_k * BM + warp_m * TM + lane // 16 * 8 + lane % 8) * ROW
            + T.bitwise_xor(lane // 8 % 2, lane % 8) * 16,
        )
        cursor[0] = device.global_cursor(
            T.address_of(x[T.Cast("int64", first_row), rows.column(thread)])
        )
        start_weight(parameters, cursors, block, thread)

        @T.inline
        def copy_round(move, r):
            tile = T.meta_var(first_tile + r * WK)
            at = T.meta_var(T.Cast("uint32", r % stages * plan.stage))
            copy_rows(
                move, 0, moving, place[1] + at, cursor[0] + T.Cast("uint64", tile * ROW), thread,
                m - first_row, rows.column(thread) + tile * TILE_K, limit,
            )  # fmt: skip
            copy_weight(
                move, rows.copies, moving, place[0] + at + T.uint32(rows.bytes), cursors,
                block, thread, tile, last,
            )  # fmt: skip

        @T.inline
        def multiply_round_async(r):
            at = T.meta_var(T.Cast("uint32", r % stages * plan.stage))
            stage = T.meta_var(place[0] + at + T.uint32(rows.bytes))
            read_weight(
                registers, stage, place[0] + T.uint32(plan.scratch_at), warp_n, warp_k, lane, thread
            )
            for step in T.unroll(STEPS):
                # Two fragments in turn: the tensor cores may still read that of the last step.
                fragment = T.meta_var(step % 2 * SN * 4)
                for s in T.unroll(SN):
                    load_fragment(a, fragment, registers, stage, warp_n, warp_k, lane, step, s)
                wgmma.fence()
                for s in T.unroll(SN):
                    multiply_async(
                        device.registers(sums, s * eights * 4),
                        device.registers(a, fragment + 4 * s),
                        wgmma.descriptor(place[0] + at) + T.uint64(2 * step),
                    )
                wgmma.commit()
                wgmma.wait(1)()

        @T.inline
        def multiply_round(r):
            at = T.meta_var(T.Cast("uint32", r % stages * plan.stage))
            stage = T.meta_var(place[0] + at + T.uint32(rows.bytes))
            read_weight(
                registers, stage, place[0] + T.uint32(plan.scratch_at), warp_n, warp_k, lane, thread
            )
            for step in T.unroll(STEPS):
                for s in T.unroll(SN):
                    load_fragment(a, 0, registers, stage, warp_n, warp_k, lane, step, s)
                for e in unrolled(TM // 16):
                    device.load_matrices_at(
                        device.registers(b, 0),
                        T.bitwise_xor(place[2] + at, T.uint32(32 * step)),
                        e * 16 * ROW,
                    )
                    for s in T.unroll(SN):
                        for h in T.unroll(2):
                            multiply(
                                device.registers(sums, (s * eights + 2 * e + h) * 4),
                                device.registers(a, 4 * s),
                                device.registers(b, 2 * h),
                            )

        for i in unrolled(fragments * 4):
            sums[i] = T.float32(0)
        if asynchronous:
            for r in T.unroll(ahead):
                if r < rounds:
                    copy_round(ASYNC, r)
                device.commit_copies()
            for r in range(rounds):
                device.wait_copies(ahead - 1)()
                if schedule.wgmma:
                    wgmma.proxy_fence()
                T.tvm_storage_sync("shared")
                if r + ahead < rounds:
                    copy_round(ASYNC, r + ahead)
                device.commit_copies()
                if schedule.wgmma:
                    multiply_round_async(r)
                else:
                    multiply_round(r)
            if schedule.wgmma:
                wgmma.wait(0)()
        else:
            if rounds > 0:
                copy_round(LOAD, 0)
                copy_round(STORE, 0)
            for r in range(rounds):
                T.tvm_storage_sync("shared")
                if r + 1 < rounds:
                    copy_round(LOAD, r + 1)
                multiply_round(r)
                if r + 1 < rounds:
                    copy_round(STORE, r + 1)
        if WK > 1:
            add_warps(sums, place[0], warp, lane)
        if most_splits > 1:
            is_last = T.alloc_buffer((1,), "uint32", scope="local")
            is_last[0] = T.uint32(1)
            if splits > 1:
                split_k.exchange(
                    sums, fragments, token_block * blocks + block, split, splits,
                    thread, 32 * WN * WM, is_last,
                )  # fmt: skip
            if is_last[0] != T.uint32(0):
                store_tile(m, sums, shared, bias, out, token_block, block, warp, lane)
        else:
            store_tile(m, sums, shared, bias, out, token_block, block, warp, lane)

    return body


def _token_blocks(schedule: ManyRows, m: Any) -> Any:
    # Of numbers above zero, the truncated quotient is the floor, and cheaper.
    return T.truncdiv(m + schedule.tokens - 1, schedule.tokens)


def _splits(schedule: ManyRows, K: int, N: int, m: Any) -> Any:
    """Into how many parts the inputs are split: few tokens make few blocks."""
    most = schedule.most_splits(K, N)
    tiles = _token_blocks(schedule, m) * -(-N // schedule.outputs)
    return 1 if most == 1 else T.max(1, T.min(T.truncdiv(schedule.blocks, tiles), most))
