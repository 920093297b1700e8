"""The parts of a decoder as Relax modules: each owns parameters and calls one kernel.

All activations are [rows, features]: rows are the tokens of all sequences of a batch, one after
the other, which is how the paged KV cache wants them too.
"""

from __future__ import annotations

from typing import Any

from mlcawq.graph._tvm import Target, nn, op
from mlcawq.graph.settings import WORDS, Quantization
from tir_kernels import dispatch
from tir_kernels.dispatch import kernels_for
from tir_kernels.foreign import with_unsigned_words
from tir_kernels.layouts import AUTOAWQ, LinearShape


class AWQLinear(nn.Module):
    """A linear on 4-bit weights in the quantization's layout (`tir_kernels.layouts`).

    silu: the N outputs are gate and up of SwiGLU, and what is returned is silu(gate) * up.
    """

    def __init__(
        self,
        target: Target,
        K: int,
        N: int,
        quantization: Quantization,
        bias: bool,
        silu: bool = False,
    ) -> None:
        group_size, dtype = quantization.group_size, quantization.dtype
        layout = quantization.weight_layout or AUTOAWQ
        assert group_size is not None
        self.shape, self.quantization = LinearShape(K, N, group_size), quantization
        arrays = self.shape.parameters(layout, dtype)
        self.qweight = nn.Parameter(arrays["qweight"][0], WORDS)
        self.qzeros = nn.Parameter(arrays["qzeros"][0], WORDS)
        self.scales = nn.Parameter(*arrays["scales"])
        self.bias = nn.Parameter((N,), dtype) if bias else None
        self.out_features = N // 2 if silu else N
        self.dtype = dtype
        kernel = dispatch.w4a16_linear(
            target,
            K,
            N,
            group_size,
            dtype,
            bias,
            layout=layout,
            silu=silu,
            scale_dtype=dtype,
            act_bits=quantization.roundings.act_bits,
        )
        self.kernel = with_unsigned_words(kernel)
        epilogue = f"{'_bias' if bias else ''}{'_silu' if silu else ''}"
        self.kernel_name = f"w4a16_{K}x{N}_g{group_size}{epilogue}"

    @property
    def weights(self) -> list[nn.Parameter]:
        """As kernels take them: qweight, qzeros, scales and, if there is one, the bias."""
        bias = [] if self.bias is None else [self.bias]
        return [self.qweight, self.qzeros, self.scales, *bias]

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[rows, K] -> [rows, N], or [rows, N/2] with silu."""
        out = nn.Tensor.placeholder((x.shape[0], self.out_features), self.dtype)
        return op.tensor_ir_op(self.kernel, self.kernel_name, [x, *self.weights], out)


class DenseLinear(nn.Module):
    """A linear on an unquantized weight [N, K]. out_dtype: float32 for logits."""

    def __init__(
        self,
        target: Target,
        K: int,
        N: int,
        bias: bool,
        dtype: str,
        out_dtype: str | None = None,
        weight: nn.Parameter | None = None,
    ) -> None:
        self.weight = weight if weight is not None else nn.Parameter((N, K), dtype)
        self.bias = nn.Parameter((N,), dtype) if bias else None
        self.out_features = N
        self.out_dtype = out_dtype or dtype
        self.kernel = dispatch.dense_linear(target, K, N, dtype, bias, self.out_dtype)
        self.kernel_name = f"dense_{K}x{N}{'_bias' if bias else ''}_{self.out_dtype}"

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[rows, K] -> [rows, N]."""
        weights = [self.weight] if self.bias is None else [self.weight, self.bias]
        out = nn.Tensor.placeholder((x.shape[0], self.out_features), self.out_dtype)
        return op.tensor_ir_op(self.kernel, self.kernel_name, [x, *weights], out)


class RMSNorm(nn.Module):
    """Root mean square norm, with fp32 inside; `add` takes in the residual on the way."""

    def __init__(self, target: Target, size: int, eps: float, dtype: str) -> None:
        self.weight = nn.Parameter((size,), dtype)
        self.eps, self.dtype = eps, dtype
        kernels = kernels_for(target)
        self.plain = kernels.rms_norm(target, size, eps, dtype)
        self.adding = kernels.add_rms_norm(target, size, eps, dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[rows, size] -> [rows, size]."""
        out = nn.Tensor.placeholder(x.shape, self.dtype)
        return op.tensor_ir_op(self.plain, "rms_norm", [x, self.weight], out)

    def add(self, x: nn.Tensor, residual: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """(x + residual, norm of that), both [rows, size]."""
        outs = [nn.Tensor.placeholder(x.shape, self.dtype) for _ in range(2)]
        result: Any = op.tensor_ir_op(self.adding, "add_rms_norm", [x, residual, self.weight], outs)
        return result[0], result[1]


class HeadNorm(nn.Module):
    """A weight of RMS norm over one head; the kernel for q and k together is `qk_norm`."""

    def __init__(self, head_dim: int, dtype: str) -> None:
        self.weight = nn.Parameter((head_dim,), dtype)


class Embedding(nn.Module):
    """Rows of a table [vocabulary, hidden]."""

    def __init__(self, target: Target, vocab_size: int, hidden_size: int, dtype: str) -> None:
        self.weight = nn.Parameter((vocab_size, hidden_size), dtype)
        self.take = RowPicker(target, hidden_size, dtype)

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """int32 [rows] -> [rows, hidden]."""
        return self.take(self.weight, ids)


class RowPicker(nn.Module):
    """Takes rows of [n, width], by their numbers or the last one."""

    def __init__(self, target: Target, width: int, dtype: str) -> None:
        self.width, self.dtype = width, dtype
        kernels = kernels_for(target)
        self.by_number = kernels.take_rows(target, width, dtype)
        self.by_end = kernels.last_row(target, width, dtype)

    def forward(self, table: nn.Tensor, rows: nn.Tensor) -> nn.Tensor:
        """table [n, width], rows int32 [m] -> [m, width]; a row out of range is clipped."""
        out = nn.Tensor.placeholder((rows.shape[0], self.width), self.dtype)
        return op.tensor_ir_op(self.by_number, "take_rows", [table, rows], out)

    def last(self, x: nn.Tensor) -> nn.Tensor:
        """[n, width] -> [1, width]."""
        out = nn.Tensor.placeholder((1, self.width), self.dtype)
        return op.tensor_ir_op(self.by_end, "last_row", [x], out)
