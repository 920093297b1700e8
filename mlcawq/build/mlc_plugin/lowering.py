"""AWQ linears of a Relax module become calls of our kernels, with silu(gate) * up where it fits.

A model of mlc_llm splits the outputs of its fused gate_up and multiplies silu of the first half by
the second. Where weights lie in the tiled layout, whose gate and up are interleaved, the kernel
does that in its epilogue, and what followed is dead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import IRModule, relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from mlcawq.build.mlc_plugin.linear import CALL
from mlcawq.errors import Problem, UserError, raise_all
from tir_kernels import dispatch
from tir_kernels.foreign import with_unsigned_words
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape


def lower_awq_linears(
    module: IRModule, target: Target, params: list[str], interleaved: Callable[[str], bool]
) -> IRModule:
    """`module` with kernels for `target` in place of every AWQ linear.

    params: names of the parameters, in the order of a function's packed ones. interleaved: whether
    the weights of a linear, given by name, have gate and up interleaved in the tiled layout.
    Raises UserError for such weights that the model uses otherwise than as silu(gate) * up, and for
    types or sizes that the target's kernels do not have.
    """
    problems: dict[str, Problem] = {}
    for name, function in module.functions_items():
        if not isinstance(function, relax.Function):
            continue
        linears = find_linears(function, params)
        fused = {}
        for linear in linears:
            if linear.layout == TILED and interleaved(linear.name):
                if linear.product is None:
                    problems[linear.name] = _not_swiglu(linear.name)
                fused[linear.product] = linear
        if linears and not problems:
            module = _Lowering(module, target, linears, fused).run(name, function)
    raise_all(problems.values())
    return module


def _not_swiglu(name: str) -> Problem:
    return Problem(
        f"in the layout {TILED} its gate and up are interleaved, but this model does not compute "
        "silu(gate) * up of them",
        name,
        f"use --weight-layout {AUTOAWQ} in all three steps",
    )


@dataclass(frozen=True)
class Linear:
    """A linear in a Relax function. name: in the model. call: of CALL. product: silu(gate) * up of
    its outputs, where that is all that they are used for.
    """

    name: str
    call: relax.Call
    product: relax.Call | None

    @property
    def operands(self) -> list[Any]:
        """x [m, K], qweight, qzeros, scales[, bias]."""
        return list(self.call.args[1])

    @property
    def layout(self) -> str:
        return TILED if len(self.operands[1].ty.shape) == 3 else AUTOAWQ

    @property
    def shape(self) -> LinearShape:
        x, _, qzeros = self.operands[:3]
        K, N = int(x.ty.shape[1]), int(self.call.ty_args[0].shape[1])
        groups = int(qzeros.ty.shape[1 if self.layout == TILED else 0])
        return LinearShape(K, N, K // groups)


def find_linears(function: relax.Function, params: list[str]) -> list[Linear]:
    """Every AWQ linear of a function whose last parameter holds the model's, in that order."""
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    values = {binding.var: binding.value for binding in bindings}
    uses: Counter[Any] = Counter()
    users: dict[Any, relax.Var] = {}
    for binding in bindings:
        for var in relax.analysis.free_vars(binding.value):
            uses[var] += 1
            users[var] = binding.var
    for var in relax.analysis.free_vars(function.body.body):
        uses[var] += 1

    def only_user(var: Any) -> Any:
        return users.get(var) if uses[var] == 1 else None

    found = []
    for binding in bindings:
        if _is_call(binding.value, "relax.call_dps_packed") and _calls(binding.value, CALL):
            qweight = values[binding.value.args[1][1]]
            name = params[qweight.index].rpartition(".")[0]
            product = _silu_product(binding.var, values, only_user)
            found.append(Linear(name, binding.value, product))
    return found


def _silu_product(var: Any, values: dict[Any, Any], only_user: Callable[[Any], Any]) -> Any:
    """The call multiply(silu(first half), second half), if `var` is used for nothing else."""
    var = only_user(var)
    while var is not None and _is_call(values[var], "relax.reshape"):
        var = only_user(var)
    if var is None or not _is_call(values[var], "relax.split"):
        return None
    split = values[var]
    if split.attrs.axis not in (-1, len(split.args[0].ty.shape) - 1):
        return None
    halves = {
        value.index: user
        for user, value in values.items()
        if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(var)
    }
    if sorted(halves) != [0, 1] or len(split.ty.fields) != 2:
        return None
    activated = only_user(halves[0])
    if activated is None or not _is_call(values[activated], "relax.nn.silu"):
        return None
    product, other = only_user(activated), only_user(halves[1])
    if product is None or not product.same_as(other):
        return None
    return values[product] if _is_call(values[product], "relax.multiply") else None


def _is_call(value: Any, op: str) -> bool:
    return isinstance(value, relax.Call) and value.op.same_as(tvm.ir.Op.get(op))


def _calls(call: relax.Call, name: str) -> bool:
    return isinstance(call.args[0], relax.ExternFunc) and call.args[0].global_symbol == name


@mutator
class _Lowering(PyExprMutator):
    """fused: linears that end in silu(gate) * up, by that product."""

    def __init__(
        self, module: IRModule, target: Target, linears: list[Linear], fused: dict[Any, Linear]
    ) -> None:
        super().__init__(module)
        self.target = target
        self.fused = fused
        within = {linear.call for linear in fused.values()}
        self.plain = {linear.call: linear for linear in linears if linear.call not in within}

    def run(self, name: Any, function: relax.Function) -> IRModule:
        changed = self.visit_expr(function)
        # What silu(gate) * up was computed by before.
        self.builder_.update_func(name, relax.analysis.remove_all_unused(changed))
        return self.builder_.get()

    def visit_call_(self, call: relax.Call) -> Any:
        if call in self.fused:
            linear = self.fused[call]
            out = self._kernel(linear, silu=True)
            return relax.op.reshape(self.builder_.emit(out), call.ty.shape)
        if call in self.plain:
            return self._kernel(self.plain[call], silu=False)
        return self._merged(self.visit_expr_post_order(call))

    def _merged(self, call: relax.Call) -> relax.Call:
        """A reshape of a reshape as one: two in a row would be fused into a kernel that copies."""
        if _is_call(call, "relax.reshape"):
            before = self.lookup_binding(call.args[0])
            if _is_call(before, "relax.reshape"):
                return relax.op.reshape(before.args[0], call.args[1])
        return call

    def _kernel(self, linear: Linear, silu: bool) -> relax.Call:
        shape, operands = linear.shape, linear.operands
        x, _, _, scales = operands[:4]
        out = linear.call.ty_args[0]
        bias = len(operands) == 5
        try:
            kernel = dispatch.w4a16_linear(
                self.target,
                shape.K,
                shape.N,
                shape.group_size,
                str(x.ty.dtype),
                bias,
                str(out.dtype),
                layout=linear.layout,
                silu=silu,
                scale_dtype=str(scales.ty.dtype),
            )
        except (NotImplementedError, ValueError) as error:
            raise UserError.one(
                f"there is no kernel for it: {error}",
                linear.name,
                f"use --weight-layout {AUTOAWQ} in all three steps, or another quantization",
            ) from error
        ending = f"{'_bias' if bias else ''}{'_silu' if silu else ''}"
        name = f"w4a16_{shape.K}x{shape.N}_g{shape.group_size}{ending}"
        function = self.builder_.add_func(with_unsigned_words(kernel), name)
        width = shape.N // 2 if silu else shape.N
        returned = relax.TensorType((out.shape[0], width), out.dtype)
        return relax.call_tir(function, [self.visit_expr(a) for a in operands], returned)
