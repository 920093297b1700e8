"""Choosing tokens on a GPU: what MLC's engine asks of a library there. Everything is fp32.

Names, arguments and meaning are those that its GPU sampler expects. A token is drawn by walking
along a row of probabilities until their running sum passes a number that is uniform in [0, 1).
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, block_sum
from tir_kernels.memo import memoized

_RUNS = 16  # of threads, whose sums are added up first
_RUN = THREADS // _RUNS
_ONE_BITS = 0x3F800000  # 1.0 as an integer: bits of positive floats are ordered as they are


@memoized
def multinomial_from_uniform(target: Target) -> PrimFunc:
    """(probabilities [b, V], uniform [n], rows int32 [n], tokens int32 [n]).

    Draw i is of row rows[i]; a token of probability 0 is never drawn.
    """
    walk = _walk(lambda total, goal: total > goal)

    @T.prim_func(private=True, s_tir=True)
    def draw(
        probabilities_handle: T.handle,
        uniform_handle: T.handle,
        rows_handle: T.handle,
        tokens_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        vocab = T.int32()
        count = T.int32()
        probabilities = T.match_buffer(probabilities_handle, (batch, vocab), "float32")
        uniform = T.match_buffer(uniform_handle, (count,), "float32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        for i in T.thread_binding(count, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                sums = T.alloc_buffer((1, THREADS), "float32", scope="shared")
                runs = T.alloc_buffer((1, _RUNS), "float32", scope="shared")
                place = T.alloc_buffer((1,), "int32", scope="shared")
                total = T.alloc_buffer((1,), "float32", scope="shared")
                walk(probabilities, rows[i], vocab, uniform[i], t, sums, runs, place, total)
                if t == 0:
                    tokens[i] = place[0]

    return draw


@memoized
def sample_with_top_p(target: Target) -> PrimFunc:
    """(sorted probabilities [b, V], sorted tokens int32 [b, V], uniform [n], rows int32 [n],
    top_p [b], tokens int32 [n]).

    Rows are sorted from the most probable token on. Draw i is of the shortest beginning of row
    rows[i] whose probabilities add up to top_p of that row.
    """
    nucleus = _walk(lambda total, goal: total >= goal)
    walk = _walk(lambda total, goal: total > goal)

    @T.prim_func(private=True, s_tir=True)
    def draw(
        probabilities_handle: T.handle,
        sorted_handle: T.handle,
        uniform_handle: T.handle,
        rows_handle: T.handle,
        top_p_handle: T.handle,
        tokens_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        vocab = T.int32()
        count = T.int32()
        probabilities = T.match_buffer(probabilities_handle, (batch, vocab), "float32")
        sorted_tokens = T.match_buffer(sorted_handle, (batch, vocab), "int32")
        uniform = T.match_buffer(uniform_handle, (count,), "float32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        top_p = T.match_buffer(top_p_handle, (batch,), "float32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        for i in T.thread_binding(count, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                sums = T.alloc_buffer((1, THREADS), "float32", scope="shared")
                runs = T.alloc_buffer((1, _RUNS), "float32", scope="shared")
                place = T.alloc_buffer((1,), "int32", scope="shared")
                total = T.alloc_buffer((1,), "float32", scope="shared")
                goal = T.alloc_buffer((1,), "float32", scope="local")
                row = T.meta_var(rows[i])
                nucleus(probabilities, row, vocab, top_p[row], t, sums, runs, place, total)
                goal[0] = uniform[i] * total[0]
                T.tvm_storage_sync("shared")
                walk(probabilities, row, vocab, goal[0], t, sums, runs, place, total)
                if t == 0:
                    tokens[i] = sorted_tokens[row, place[0]]

    return draw


@memoized
def renormalize_by_top_p(target: Target) -> PrimFunc:
    """(probabilities [b, V], top_p [b], pivots [b, 3], out [b, V]).

    Of each row stay the most probable tokens that add up to top_p, equals of the last among them,
    and are divided by their sum. The least probability that stays is found exactly, a bit at a
    time; the pivots, where MLC's own kernel begins its search, are not needed for that.
    """
    sum_of = block_sum(THREADS)

    @T.inline
    def mass_above(probabilities, b, vocab, bits, t, partial, runs, own):
        own[0] = T.float32(0)
        for j in range(T.truncdiv(vocab + (THREADS - 1), THREADS)):
            v = T.meta_var(j * THREADS + t)
            if v < vocab and probabilities[b, v] >= T.reinterpret("float32", bits):
                own[0] = own[0] + probabilities[b, v]
        T.tvm_storage_sync("shared")
        sum_of(own[0], t, partial, runs, own)

    @T.prim_func(private=True, s_tir=True)
    def renormalize(
        probabilities_handle: T.handle,
        top_p_handle: T.handle,
        pivots_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        vocab = T.int32()
        probabilities = T.match_buffer(probabilities_handle, (batch, vocab), "float32")
        top_p = T.match_buffer(top_p_handle, (batch,), "float32")
        _pivots = T.match_buffer(pivots_handle, (batch, 3), "float32")
        out = T.match_buffer(out_handle, (batch, vocab), "float32")
        for b in T.thread_binding(batch, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                partial = T.alloc_buffer((THREADS,), "float32", scope="shared")
                runs = T.alloc_buffer((_RUNS,), "float32", scope="shared")
                own = T.alloc_buffer((1,), "float32", scope="local")
                least = T.alloc_buffer((1,), "int32", scope="local")
                least[0] = 0
                for step in range(30):  # 1.0 has 30 bits
                    bit = T.meta_var(T.shift_left(1, 29 - step))
                    if least[0] + bit <= _ONE_BITS:
                        mass_above(probabilities, b, vocab, least[0] + bit, t, partial, runs, own)
                        if own[0] >= top_p[b]:
                            least[0] = least[0] + bit
                mass_above(probabilities, b, vocab, least[0], t, partial, runs, own)
                for j in range(T.truncdiv(vocab + (THREADS - 1), THREADS)):
                    v = T.meta_var(j * THREADS + t)
                    if v < vocab:
                        out[b, v] = T.Select(
                            probabilities[b, v] >= T.reinterpret("float32", least[0]),
                            probabilities[b, v] / own[0],
                            T.float32(0),
                        )

    return renormalize


@memoized
def sampler_take_probs(target: Target) -> PrimFunc:
    """(probabilities [b, V], sorted tokens int32 [b, V], rows int32 [n], tokens int32 [n],
    places int32 [m], probability of each token [n], top probabilities [m], top tokens int32 [m]).

    A place is an index into the flattened sorted tokens: row * V + rank. m may be 0.
    """

    @T.prim_func(private=True, s_tir=True)
    def take(
        probabilities_handle: T.handle,
        sorted_handle: T.handle,
        rows_handle: T.handle,
        tokens_handle: T.handle,
        places_handle: T.handle,
        taken_handle: T.handle,
        top_handle: T.handle,
        top_tokens_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        vocab = T.int32()
        count = T.int32()
        places_count = T.int32()
        probabilities = T.match_buffer(probabilities_handle, (batch, vocab), "float32")
        sorted_tokens = T.match_buffer(sorted_handle, (batch, vocab), "int32")
        rows = T.match_buffer(rows_handle, (count,), "int32")
        tokens = T.match_buffer(tokens_handle, (count,), "int32")
        places = T.match_buffer(places_handle, (places_count,), "int32")
        taken = T.match_buffer(taken_handle, (count,), "float32")
        top = T.match_buffer(top_handle, (places_count,), "float32")
        top_tokens = T.match_buffer(top_tokens_handle, (places_count,), "int32")
        blocks = T.meta_var(T.truncdiv(T.max(count, places_count) + (THREADS - 1), THREADS))
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                i: T.let[T.int32] = block * THREADS + t
                if i < count:
                    taken[i] = probabilities[rows[i], tokens[i]]
                if i < places_count:
                    row = T.meta_var(T.truncdiv(places[i], vocab))
                    token = T.meta_var(sorted_tokens[row, T.truncmod(places[i], vocab)])
                    top_tokens[i] = token
                    top[i] = probabilities[row, token]

    return take


def _walk(passes):
    """TIR that finds where the running sum of a row of probabilities passes a goal.

    passes: (sum, goal) -> condition. Called with the probabilities, the row, its length, the goal,
    the thread, and shared buffers sums [1, THREADS], runs [1, 16], place int32 [1] and total [1].
    All threads then see the index in place[0] and the sum up to and with it in total[0]. Where the
    whole sum does not pass the goal, the index is the last one with a positive probability.

    Every thread sums a part of the row, and the first one finds the part that has the goal in it;
    the same once more in that part; then the first thread walks along what is left, a few elements.
    """

    @T.inline
    def pick(values, row, first, count, goal, before, found):
        """found[0]: the value that passes the goal, counted from `first`. before[0]: the sum of all
        before it, in and out.
        """
        found[0] = 0
        found[1] = 0
        before[1] = before[0]
        for i in range(count):
            value = T.alloc_buffer((1,), "float32", scope="local")
            value[0] = values[row, first + i]
            if found[1] == 0 and value[0] > T.float32(0):
                found[0] = i
                before[0] = before[1]
                before[1] = before[1] + value[0]
                if passes(before[1], goal):
                    found[1] = 1

    @T.inline
    def narrow(values, row, end, part, goal, t, sums, runs, place, first, before, found):
        """Move to the part of its thread, of `part` elements from first[0] on, that has the goal in
        it, and tell all threads.
        """
        before[1] = T.float32(0)
        for i in range(part):
            v = T.meta_var(first[0] + t * part + i)
            if v < end:
                before[1] = before[1] + values[row, v]
        sums[0, t] = before[1]
        T.tvm_storage_sync("shared")
        if t < _RUNS:
            runs[0, t] = T.float32(0)
            for i in range(_RUN):
                runs[0, t] = runs[0, t] + sums[0, t * _RUN + i]
        T.tvm_storage_sync("shared")
        if t == 0:
            pick(runs, 0, 0, _RUNS, goal, before, found)
            found[2] = found[0] * _RUN
            pick(sums, 0, found[2], _RUN, goal, before, found)
            place[0] = first[0] + (found[2] + found[0]) * part
        T.tvm_storage_sync("shared")
        first[0] = place[0]

    @T.inline
    def walk(values, row, length, goal, t, sums, runs, place, total):
        before = T.alloc_buffer((2,), "float32", scope="local")
        found = T.alloc_buffer((3,), "int32", scope="local")
        first = T.alloc_buffer((1,), "int32", scope="local")
        end = T.alloc_buffer((1,), "int32", scope="local")
        part = T.meta_var(T.truncdiv(length + (THREADS - 1), THREADS))
        rest = T.meta_var(T.truncdiv(part + (THREADS - 1), THREADS))
        before[0] = T.float32(0)
        first[0] = 0
        end[0] = length
        narrow(values, row, end[0], part, goal, t, sums, runs, place, first, before, found)
        end[0] = T.min(first[0] + part, length)
        narrow(values, row, end[0], rest, goal, t, sums, runs, place, first, before, found)
        T.tvm_storage_sync("shared")  # before place[0] is written again
        if t == 0:
            pick(values, row, first[0], T.min(rest, length - first[0]), goal, before, found)
            found[2] = first[0] + found[0]
            place[0] = found[2]
            total[0] = before[0] + values[row, found[2]]
        T.tvm_storage_sync("shared")

    return walk
