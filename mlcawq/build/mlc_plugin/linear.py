"""The AWQ linear that mlc_llm's models get: mlc_llm's parameters, in the layout of our kernels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from mlc_llm.quantization.awq_quantization import AWQQuantizeLinear
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from mlcawq.build.mlc_plugin.lowering import CALL
from tir_kernels.layouts import AUTOAWQ, LinearShape


class AwqLinear(AWQQuantizeLinear):
    """qweight, qzeros (uint32) and scales as `LinearShape.parameters` has them for the layout of
    the quantization, which is its `weight_layout`; an optional bias [N].

    has_kernel: whether the target that is compiled for has a kernel for a linear; without one, the
    linear is mlc_llm's own, which only the stock layout can be. Set by the compile step.
    """

    has_kernel: Callable[[AwqLinear], bool] = staticmethod(lambda _linear: True)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: Any,
        bias: bool = True,
        out_dtype: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, config, bias, out_dtype)
        self.shape = LinearShape(in_features, out_features, config.group_size)
        if config.weight_layout != AUTOAWQ:
            arrays = self.shape.parameters(config.weight_layout, config.model_dtype)
            for name, (shape, dtype) in arrays.items():
                stored = config.storage_dtype if dtype == "int32" else dtype
                setattr(self, name, nn.Parameter(shape, stored))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any) -> AwqLinear:
        """The quantized form of `linear`, with parameters that are yet to be loaded."""
        bias = getattr(linear, "bias", None) is not None
        return cls(linear.in_features, linear.out_features, config, bias, linear.out_dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[..., K] -> [..., N]."""
        if not AwqLinear.has_kernel(self):
            return super().forward(x)
        dtype = self.out_dtype or x.dtype
        *batch, K = x.shape
        rows = op.reshape(x, (prod(batch), K))
        out = nn.Tensor.placeholder((prod(batch), self.out_features), dtype)
        # A kernel's bias has the type of its inputs.
        inside = self.bias is not None and self.bias.dtype == x.dtype
        weights = [self.qweight, self.qzeros, self.scales, *([self.bias] if inside else [])]
        product = op.reshape(op.extern(CALL, [rows, *weights], out), (*batch, self.out_features))
        return product if inside or self.bias is None else product + self.bias
