"""What MLC's C++ engine does with a library, step by step: the same functions, in the same order,
with arguments of the same shapes, types and places, and the checks that it makes on the way.

Sources: cpp/metadata/model.cc, cpp/serve/function_table.cc, model.cc, logit_processor.cc and
sampler/gpu_sampler.cc of mlc_llm at 79d603f. Buffers that the engine reserves are reserved here, at
its sizes, and handed on as views of their beginnings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm_ffi import Shape

from tests.mlc_format.description import check_types, golden

PAGE_SIZE = 16  # EngineConfigNode's kv_cache_page_size
_POOLED = 2
_CPU = 1
_GPU_SAMPLER = ("multinomial_from_uniform", "argsort_probs", "sample_with_top_p")
_GPU_SAMPLER += ("sampler_take_probs",)


class MlcEngine:
    """A folder in one of its engine's modes; "local" has room for four sequences.

    gpu_sampler: draw on the device, which the engine does with CUDA and with TVM's Vulkan.
    """

    def __init__(
        self, folder: Path, library: Any, device: Any = None, *, gpu_sampler: bool = False
    ) -> None:
        self.device = device or tvm.cpu()
        self.config = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))
        check_types(self.config, golden("engine-reads.json")["mlc-chat-config.json"])
        # ------------------------------------------------------------------ FunctionTable::Init
        if isinstance(library, Path):
            library = tvm.runtime.load_module(str(library))
        self.vm = library["vm_load_executable"]()
        kind = self.device.dlpack_device_type()
        self.vm["vm_initialization"](kind, self.device.index, _POOLED, _CPU, 0, _POOLED)
        self.metadata = json.loads(self.vm["_metadata"]())
        check_types(self.metadata, golden("engine-reads.json")["_metadata"])
        assert self.metadata["tensor_parallel_shards"] == 1
        assert self.metadata.get("pipeline_parallel_stages", 1) == 1
        assert self.metadata.get("kv_state_kind", "kv_cache") == "kv_cache"
        initialize = self._optional("cuda_graph_alloc_init")
        if initialize is not None:
            initialize()
        self.gpu_sampler = gpu_sampler
        for name in _GPU_SAMPLER if gpu_sampler else ():
            assert self._optional(name) is not None, f"GPUSampler refuses a library without {name}"
        for name in ("apply_logit_bias_inplace", "apply_penalty_inplace", "apply_bitmask_inplace"):
            assert self._optional(name) is not None, f"{name} not found in model"
        # ------------------------------------------- config.cc: limits, in the engine's local mode
        batch = min(4, self.metadata["max_batch_size"])
        length = min(self.config["context_window_size"], self.metadata["context_window_size"])
        self.total = min(length, 8192)
        chunk = min(self.config["prefill_chunk_size"], self.metadata["prefill_chunk_size"])
        self.chunk, self.batch = min(chunk, self.total, length), batch
        self.vocabulary = self.config["vocab_size"]
        self.params = self._load_params(folder)
        self._reserve()
        create = self._optional("create_flashinfer_paged_kv_cache")
        create = create or self.function("create_tir_paged_kv_cache")
        window = self.config.get("sliding_window_size", -1)
        sizes = (batch, self.total, self.chunk, PAGE_SIZE, int(window != -1))
        self.cache = create(*(Shape([size]) for size in sizes))
        self.embeddings = self.function("alloc_embedding_tensor")()
        assert len(self.embeddings.shape) == 2
        assert self.embeddings.shape[0] >= self.chunk
        self.hidden = int(self.embeddings.shape[1])

    def function(self, name: str) -> Any:
        """A function of the library, be it a kernel that the virtual machine does not know."""
        return self.vm.get_function(name, query_imports=True)

    def _optional(self, name: str) -> Any:
        return self.function(name) if self.vm.implements_function(name, True) else None

    def _load_params(self, folder: Path) -> Any:
        load = tvm.get_global_func("vm.builtin.tensor_cache.load")
        load(str(folder), self.device.dlpack_device_type(), self.device.index)
        names = [parameter["name"] for parameter in self.metadata["params"]]
        params = tvm.get_global_func("vm.builtin.param_array_from_cache_by_name")(names)
        tvm.get_global_func("vm.builtin.tensor_cache.clear")()
        return params

    def _reserve(self) -> None:
        n, vocabulary = self.batch, self.vocabulary
        sizes: dict[str, tuple[tuple[int, ...], str]] = {
            "token_ids": ((self.chunk,), "int32"),
            "logit_pos": ((n,), "int32"),
            "seq_ids": ((n,), "int32"),
            "pos2seq_id": ((n * vocabulary,), "int32"),
            "penalty_token_ids": ((n * vocabulary,), "int32"),
            "token_cnt": ((n * vocabulary,), "int32"),
            "token_logit_bias": ((n * vocabulary,), "float32"),
            "penalties": ((n, 3), "float32"),
            "bitmask": ((n, (vocabulary + 31) // 32), "int32"),
            "temperature": ((n,), "float32"),
            "uniform_samples": ((n,), "float32"),
            "sample_indices": ((n,), "int32"),
            "top_p": ((n,), "float32"),
            "top_p_init_pivots": ((n, 3), "float32"),
            "top_prob_offsets": ((n * 5,), "int32"),
        }
        self.reserved = {
            name: tvm.runtime.empty(shape, dtype, self.device)
            for name, (shape, dtype) in sizes.items()
        }

    def _copied(self, name: str, array: Any) -> Any:
        """`array` at the beginning of a reserved buffer, as a view of its shape."""
        buffer = self.reserved[name]
        array = np.asarray(array, str(buffer.dtype))
        return buffer._create_view(array.shape, buffer.dtype).copyfrom(array)

    # -------------------------------------------------------------------------- Model::KV cache

    def add(self, sequence: int) -> None:
        tvm.get_global_func("vm.builtin.kv_state_add_sequence")(self.cache, sequence)

    def fork(self, parent: int, child: int, position: int) -> None:
        fork = tvm.get_global_func("vm.builtin.kv_state_fork_sequence")
        fork(self.cache, parent, child, position)

    def pop(self, sequence: int, count: int) -> None:
        tvm.get_global_func("vm.builtin.kv_state_popn")(self.cache, sequence, count)

    def total_length(self) -> int:
        name = "vm.builtin.attention_kv_cache_get_total_sequence_length"
        return int(tvm.get_global_func(name)(self.cache))

    # --------------------------------------------------------------------------- Model::forward

    def _embed(self, tokens: Sequence[int], offset: int | None) -> Any:
        """TokenEmbed: into the reserved tensor from row `offset` on, or a tensor of its own."""
        embedded = self.function("embed")(self._copied("token_ids", tokens), self.params)
        assert tuple(embedded.shape) == (len(tokens), self.hidden)
        if offset is None:
            return embedded
        rows = self.embeddings.numpy()  # mlc.copy_embedding_to_offset is the engine's own
        rows[offset : offset + len(tokens)] = embedded.numpy()
        self.embeddings.copyfrom(rows)
        return self.embeddings

    def _begin(self, sequences: Sequence[int], lengths: Sequence[int], *tree: Any) -> None:
        begin = tvm.get_global_func("vm.builtin.kv_state_begin_forward")
        begin(self.cache, Shape(list(sequences)), Shape(list(lengths)), *tree)

    def _logits(self, result: Any, shape: tuple[int, ...]) -> Any:
        """Element 0 of what the function returns, after the end of the forward pass."""
        logits = result[0]
        tvm.get_global_func("vm.builtin.kv_state_end_forward")(self.cache)
        assert tuple(logits.shape) == shape
        assert str(logits.dtype) == "float32"
        assert logits.device == self.device
        return logits

    def batch_prefill(self, chunks: dict[int, Sequence[int]]) -> Any:
        """Logits on the device [1, sequences, vocabulary] after a chunk of each sequence."""
        sequences, lengths = list(chunks), [len(chunk) for chunk in chunks.values()]
        total, embeddings = 0, self.embeddings
        for chunk in chunks.values():
            embeddings = self._embed(chunk, total)
            total += len(chunk)
        last = np.cumsum(lengths) - 1
        self._begin(sequences, lengths)
        view = embeddings._create_view((1, total, self.hidden), embeddings.dtype)
        positions = self._copied("logit_pos", last)
        if len(sequences) == 1:
            result = self.function("prefill")(view, self.cache, self.params)
        else:
            result = self.function("batch_prefill")(view, positions, self.cache, self.params)
        return self._logits(result, (1, len(sequences), self.vocabulary))

    def batch_decode(self, tokens: dict[int, int]) -> Any:
        """Logits on the device [sequences, 1, vocabulary] after one more token each."""
        n = len(tokens)
        embeddings = self._embed(list(tokens.values()), None)
        self._begin(list(tokens), [1] * n)
        view = embeddings._create_view((n, 1, self.hidden), embeddings.dtype)
        name = "decode" if n == 1 else "batch_decode"
        result = self.function(name)(view, self.cache, self.params)
        return self._logits(result, (n, 1, self.vocabulary))

    def batch_verify(self, chunks: dict[int, Sequence[int]]) -> Any:
        """Logits on the device [1, tokens, vocabulary]; each chunk is a tree that is a chain."""
        lengths = [len(chunk) for chunk in chunks.values()]
        tokens = [token for chunk in chunks.values() for token in chunk]
        parents = [parent for length in lengths for parent in range(-1, length - 1)]
        embeddings = self._embed(tokens, None)
        self._begin(list(chunks), lengths, Shape(parents))
        view = embeddings._create_view((1, len(tokens), self.hidden), embeddings.dtype)
        result = self.function("batch_verify")(view, self.cache, self.params)
        return self._logits(result, (1, len(tokens), self.vocabulary))

    def accept(self, leaves: dict[int, int]) -> None:
        """Of each sequence's tree, keep the way to a node."""
        commit = tvm.get_global_func(
            "vm.builtin.attention_kv_cache_commit_accepted_token_tree_nodes"
        )
        commit(self.cache, Shape(list(leaves)), Shape(list(leaves.values())))

    # ---------------------------------------------------------------------------- LogitProcessor

    def flat(self, logits: Any) -> Any:
        """[n, vocabulary], as engine actions hand logits on."""
        n = int(logits.shape[0]) * int(logits.shape[1])
        return logits._create_view((n, self.vocabulary), "float32")

    def apply_bias(self, logits: Any, bias: dict[tuple[int, int], float]) -> None:
        """bias: (row, token) -> what is added."""
        self.function("apply_logit_bias_inplace")(
            logits,
            self._copied("pos2seq_id", [row for row, _ in bias]),
            self._copied("penalty_token_ids", [token for _, token in bias]),
            self._copied("token_logit_bias", list(bias.values())),
        )

    def apply_penalties(
        self, logits: Any, row: int, counts: dict[int, int], penalties: tuple[float, float, float]
    ) -> None:
        """penalties: presence, frequency, repetition, of one row. counts: token -> times."""
        self.function("apply_penalty_inplace")(
            logits,
            self._copied("seq_ids", [row]),
            self._copied("pos2seq_id", [0] * len(counts)),
            self._copied("penalty_token_ids", list(counts)),
            self._copied("token_cnt", list(counts.values())),
            self._copied("penalties", [penalties]),
        )

    def apply_mask(self, logits: Any, row: int, allowed: Sequence[int]) -> None:
        """Only `allowed` tokens stay possible in a row."""
        words = np.zeros((int(logits.shape[0]), (self.vocabulary + 31) // 32), np.uint32)
        for token in allowed:
            words[row, token // 32] |= np.uint32(1 << (token % 32))
        mask = self._copied("bitmask", words.view(np.int32))
        self.function("apply_bitmask_inplace")(logits, self._copied("seq_ids", [row]), mask)

    def probabilities(self, logits: Any, temperatures: Sequence[float]) -> Any:
        """[n, vocabulary] on the device."""
        n = len(temperatures)
        view = logits._create_view((n, 1, self.vocabulary), "float32")
        probs = self.function("softmax_with_temperature")(
            view, self._copied("temperature", temperatures)
        )
        assert tuple(probs.shape) == (n, 1, self.vocabulary)
        return probs._create_view((n, self.vocabulary), "float32")

    # -------------------------------------------------------------------------------- GPUSampler

    def draw(self, probs: Any, top_p: Sequence[float], uniform: Sequence[float]) -> list[int]:
        """One token a row: renormalized by top_p first, where one is not 1."""
        n = len(top_p)
        if any(p != 1 for p in top_p):
            given = np.maximum(np.array(top_p, np.float32), np.float32(1e-5))
            probs = self.function("renormalize_by_top_p")(
                probs,
                self._copied("top_p", given),
                self._copied("top_p_init_pivots", _initial_pivots(given)),
            )
            assert tuple(probs.shape) == (n, self.vocabulary)
        drawn = self.function("multinomial_from_uniform")(
            probs,
            self._copied("uniform_samples", uniform),
            self._copied("sample_indices", range(n)),
        )
        assert (tuple(drawn.shape), str(drawn.dtype)) == ((n,), "int32")
        return [int(token) for token in drawn.numpy()]

    def draw_with_logprobs(
        self, probs: Any, uniform: Sequence[float], top: Sequence[int]
    ) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, their probabilities, and of each row the `top` likeliest: theirs, and which."""
        n = len(top)
        ranked, order = self.function("argsort_probs")(probs)
        assert tuple(ranked.shape) == tuple(order.shape) == (n, self.vocabulary)
        rows = self._copied("sample_indices", range(n))
        drawn = self.function("multinomial_from_uniform")(
            probs, self._copied("uniform_samples", uniform), rows
        )
        places = [row * self.vocabulary + j for row, most in enumerate(top) for j in range(most)]
        offsets = self._copied("top_prob_offsets", places)
        taken = self.function("sampler_take_probs")(probs, order, rows, drawn, offsets)
        assert [tuple(t.shape) for t in taken] == [(n,), (len(places),), (len(places),)]
        tokens = [int(token) for token in drawn.numpy()]
        return tokens, taken[0].numpy(), taken[1].numpy(), taken[2].numpy()

    def draw_before_top_p(
        self, probs: Any, top_p: Sequence[float], uniform: Sequence[float]
    ) -> list[int]:
        """One token a row, top_p applied while drawing."""
        ranked, order = self.function("argsort_probs")(probs)
        drawn = self.function("sample_with_top_p")(
            ranked,
            order,
            self._copied("uniform_samples", uniform),
            self._copied("sample_indices", range(len(top_p))),
            self._copied("top_p", top_p),
        )
        return [int(token) for token in drawn.numpy()]


def _initial_pivots(top_p: np.ndarray) -> np.ndarray:
    rest = 1 - top_p
    wide = np.stack([np.minimum(rest, 0.5), np.full_like(rest, 0.02), np.full_like(rest, 0.01)], 1)
    return np.where(rest[:, None] >= 0.02, wide, np.stack([rest, rest / 2, rest / 4], 1))
