"""4-bit experts in mlc_llm's models: a mixture's linears, one for all experts, on our kernels.

mlc_llm's mixtures of experts call such a linear in two ways, chosen while the model is traced: with
the numbers of the experts that one token goes to, where the number of tokens is known to be one,
and otherwise with rows sorted by expert and where each expert's begin.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.target import Target

from mlcawq.build.mlc_plugin.lowering import find_calls
from mlcawq.errors import UserError
from tir_kernels import dispatch
from tir_kernels.foreign import with_root_block, with_unsigned_words
from tir_kernels.layouts import ExpertsShape

# While a model is traced, experts are a call of this name, which `lower_awq_experts` makes a call
# of a kernel. In a step that only wants the parameters it stays.
CALL = "mlcawq.w4a16_experts"


class AwqExperts(nn.Module):
    """In place of mlc_llm's MixtralExperts: qweight, qzeros (uint32) and scales as
    `ExpertsShape.parameters` has them.
    """

    def __init__(self, shape: ExpertsShape, config: Any) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = config.model_dtype
        arrays = shape.parameters(scale_dtype=config.model_dtype)
        for name, (sizes, dtype) in arrays.items():
            stored = config.storage_dtype if dtype == "int32" else dtype
            setattr(self, name, nn.Parameter(sizes, stored))

    def forward(self, x: nn.Tensor, routing: nn.Tensor) -> nn.Tensor:
        """x [1 or rows, K] and experts int32 [1, rows], or x [rows, K] and indptr int32 [E + 1]
        -> [rows, N].
        """
        rows = routing.shape[1] if routing.ndim == 2 else x.shape[0]
        out = nn.Tensor.placeholder((rows, self.shape.N), x.dtype)
        return op.extern(CALL, [x, routing, self.qweight, self.qzeros, self.scales], out)


def lower_awq_experts(module: IRModule, target: Target) -> IRModule:
    """`module` with kernels for `target` in place of all AWQ experts, and of silu(gate) * up behind
    them.

    The latter is more than speed: rows of several tokens are a multiple of the tokens, and TVM 0.26
    fails to fuse what is computed element by element over such a number of rows.
    Raises UserError where the target has no kernels for experts.
    """
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            found = find_calls(function, CALL)
            if found:
                module = _Lowering(module, target, found).run(name, function)
    return module


@mutator
class _Lowering(PyExprMutator):
    def __init__(self, module: IRModule, target: Target, found: dict[relax.Var, Any]) -> None:
        super().__init__(module)
        self.target = target
        self.calls = {call for call, _ in found.values()}
        self.products = {product: var for var, (_, product) in found.items() if product is not None}

    def run(self, name: Any, function: relax.Function) -> IRModule:
        changed = self.visit_expr(function)
        self.builder_.update_func(name, relax.analysis.remove_all_unused(changed))
        return self.builder_.get()

    def visit_call_(self, call: relax.Call) -> Any:
        if call in self.products:
            return self._silu_multiply(self.products[call])
        if call in self.calls:
            return self._experts(call)
        return self.visit_expr_post_order(call)

    def _silu_multiply(self, gate_up: relax.Var) -> relax.Call:
        rows, width = gate_up.ty.shape
        size, dtype = int(width) // 2, str(gate_up.ty.dtype)
        kernel = dispatch.kernels_for(self.target).silu_multiply(self.target, size, dtype)
        function = self.builder_.add_func(with_root_block(kernel), "silu_multiply")
        out = relax.TensorType((rows, size), dtype)
        return relax.call_tir(function, [self.visit_expr(gate_up)], out)

    def _experts(self, call: relax.Call) -> relax.Call:
        x, routing, qweight, qzeros, scales = call.args[1]
        (out,) = call.ty_args
        experts, K, _ = (int(size) for size in qweight.ty.shape)
        sizes = (experts, K, int(out.shape[1]), K // int(qzeros.ty.shape[1]), str(x.ty.dtype))
        decoding = len(routing.ty.shape) == 2
        try:
            if decoding:
                kernel = dispatch.w4a16_experts_decode(
                    self.target,
                    *sizes,
                    x_rows=int(x.ty.shape[0]),
                    rows=int(out.shape[0]),
                    scale_dtype=str(scales.ty.dtype),
                )
            else:
                kernel = dispatch.w4a16_experts_grouped(
                    self.target, *sizes, scale_dtype=str(scales.ty.dtype)
                )
        except (NotImplementedError, ValueError) as error:
            raise UserError.one(
                f"AWQ experts cannot be computed on this target: {error}",
                fix="choose another target or quantization",
            ) from error
        name = f"w4a16_experts_{'decode' if decoding else 'grouped'}"
        function = self.builder_.add_func(with_unsigned_words(kernel), name)
        return relax.call_tir(function, [self.visit_expr(a) for a in call.args[1]], out)
