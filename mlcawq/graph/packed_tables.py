"""The output head and the embedding as Relax modules, where they are packed (`graph.tables`)."""

from __future__ import annotations

from mlcawq.graph._tvm import Target, nn, op
from mlcawq.graph.settings import WORDS
from mlcawq.graph.tables import Table
from tir_kernels import dispatch
from tir_kernels.foreign import with_unsigned_words
from tir_kernels.layouts import BLOCKED


class PackedTable(nn.Module):
    """A table [rows, width]. dtype: of activations and scales."""

    def __init__(self, table: Table, rows: int, width: int, dtype: str) -> None:
        arrays = table.parameters(rows, width, dtype)
        self.qweight = nn.Parameter(arrays["qweight"][0], WORDS)
        if "qzeros" in arrays:
            self.qzeros = nn.Parameter(arrays["qzeros"][0], WORDS)
        self.scales = nn.Parameter(*arrays["scales"])
        self.table, self.rows, self.width, self.dtype = table, rows, width, dtype

    def arrays(self) -> list[nn.Parameter]:
        """In the kernels' order."""
        names = ("qweight", "scales") if self.table.bits == 8 else ("qweight", "qzeros", "scales")
        return [getattr(self, name) for name in names]


class PackedEmbedding(PackedTable):
    """Rows of a table, dequantized."""

    def __init__(self, target: Target, table: Table, rows: int, width: int, dtype: str) -> None:
        super().__init__(table, rows, width, dtype)
        kernel = dispatch.take_packed_rows(
            target, table.bits, rows, width, table.group_size, dtype, scale_dtype=dtype
        )
        self.kernel = with_unsigned_words(kernel)

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """int32 [m] -> [m, width]; a row out of range is clipped."""
        out = nn.Tensor.placeholder((ids.shape[0], self.width), self.dtype)
        return op.tensor_ir_op(self.kernel, "take_packed_rows", [*self.arrays(), ids], out)


class PackedHead(PackedTable):
    """Logits. tied: the embedding whose arrays the head takes, None where it has its own."""

    def __init__(
        self,
        target: Target,
        table: Table,
        rows: int,
        width: int,
        dtype: str,
        tied: PackedEmbedding | None = None,
    ) -> None:
        super().__init__(table, rows, width, dtype)
        self.weights = (tied or self).arrays()
        shape = (target, width, rows, table.group_size, dtype)
        if table.bits == 8:
            kernel = dispatch.w8a16_linear(*shape, "float32", scale_dtype=dtype)
        else:
            kernel = dispatch.w4a16_linear(
                *shape, False, "float32", layout=BLOCKED, scale_dtype=dtype
            )
        self.kernel = with_unsigned_words(kernel)
        self.kernel_name = f"head_{table.name}_{width}x{rows}"

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[m, width] -> float32 [m, rows]."""
        out = nn.Tensor.placeholder((x.shape[0], self.rows), "float32")
        return op.tensor_ir_op(self.kernel, self.kernel_name, [x, *self.weights], out)
