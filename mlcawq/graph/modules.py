"""The parts of a decoder as Relax modules: each owns parameters and calls one kernel.

All activations are [rows, features]: rows are the tokens of all sequences of a batch, one after
the other, which is how the paged KV cache wants them too.
"""

from __future__ import annotations

from typing import Any

from mlcawq.graph._tvm import Target, nn, op, relax, te
from tir_kernels import cpu, dispatch


class AWQLinear(nn.Module):
    """A linear on 4-bit weights as AutoAWQ stores them (`tir_kernels.layouts`)."""

    def __init__(
        self, target: Target, K: int, N: int, group_size: int, bias: bool, dtype: str
    ) -> None:
        self.qweight = nn.Parameter((K, N // 8), "int32")
        self.qzeros = nn.Parameter((K // group_size, N // 8), "int32")
        self.scales = nn.Parameter((K // group_size, N), "float16")
        self.bias = nn.Parameter((N,), dtype) if bias else None
        self.out_features = N
        self.dtype = dtype
        self.kernel = dispatch.w4a16_linear(target, K, N, group_size, dtype, bias)
        self.kernel_name = f"w4a16_{K}x{N}_g{group_size}{'_bias' if bias else ''}"

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[rows, K] -> [rows, N]."""
        weights = [self.qweight, self.qzeros, self.scales]
        if self.bias is not None:
            weights.append(self.bias)
        out = nn.Tensor.placeholder((x.shape[0], self.out_features), self.dtype)
        return op.tensor_ir_op(self.kernel, self.kernel_name, [x, *weights], out)


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
        self.dtype = dtype
        self.plain = cpu.rms_norm(target, size, eps, dtype)
        self.adding = cpu.add_rms_norm(target, size, eps, dtype)

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

    def __init__(self, vocab_size: int, hidden_size: int, dtype: str) -> None:
        self.weight = nn.Parameter((vocab_size, hidden_size), dtype)

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """int32 [rows] -> [rows, hidden]."""
        return take_rows(self.weight, ids)


def take_rows(table: nn.Tensor, rows: nn.Tensor) -> nn.Tensor:
    """table [n, width], rows int32 [m] -> [m, width]; a row that is out of range is clipped.

    `op.take` would read whatever lies there, and makes TVM warn of that at every compilation.
    """
    return nn.wrap_nested(relax.op.take(table._expr, rows._expr, axis=0, mode="clip"), "take")


def last_row(x: nn.Tensor) -> nn.Tensor:
    """[n, m] -> [1, m]. The length of a slice would be planned at its upper bound, n."""

    def select(rows: Any) -> Any:
        n, m = rows.shape
        return te.compute((1, m), lambda _, j: rows[n - 1, j], name="last_row")

    return op.tensor_expr_op(select, "last_row", [x])
