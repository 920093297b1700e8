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
from tvm.tirx import PrimFunc

from mlcawq.errors import Problem, UserError, raise_all
from tir_kernels import dispatch
from tir_kernels.foreign import with_unsigned_words
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

# While a model is traced, a linear is one call of this name: which kernel it becomes depends on
# what follows it. In a step that only wants the parameters it stays.
CALL = "mlcawq.w4a16_linear"


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
            # Before the mutator runs: errors that pass through TVM lose their type.
            products = {linear.call for linear in fused.values()}
            kernels = {
                linear.call: _kernel(target, linear, linear.call in products) for linear in linears
            }
            module = _Lowering(module, linears, fused, kernels).run(name, function)
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
    values = {binding.var: binding.value for binding in _bindings(function)}
    found = []
    for call, product in find_calls(function, CALL).values():
        qweight = values[call.args[1][1]]
        found.append(Linear(params[qweight.index].rpartition(".")[0], call, product))
    return found


def find_calls(
    function: relax.Function, name: str
) -> dict[relax.Var, tuple[relax.Call, relax.Call | None]]:
    """Every call of what `AwqLinear` and its like leave, by what it is bound to; beside it
    silu(gate) * up of its outputs, where that is all that they are used for.
    """
    bindings = _bindings(function)
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

    return {
        binding.var: (binding.value, _silu_product(binding.var, values, only_user))
        for binding in bindings
        if _is_call(binding.value, "relax.call_dps_packed") and _calls(binding.value, name)
    }


def _bindings(function: relax.Function) -> list[Any]:
    return [binding for block in function.body.blocks for binding in block.bindings]


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
    """fused: linears that end in silu(gate) * up, by that product. kernels: by a linear's call."""

    def __init__(
        self,
        module: IRModule,
        linears: list[Linear],
        fused: dict[Any, Linear],
        kernels: dict[relax.Call, Kernel],
    ) -> None:
        super().__init__(module)
        self.kernels = kernels
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
            out = self.builder_.emit(self._lowered(self.fused[call]))
            return relax.op.reshape(out, call.ty.shape)
        if call in self.plain:
            return self._lowered(self.plain[call])
        return self._merged(self.visit_expr_post_order(call))

    def _merged(self, call: relax.Call) -> relax.Call:
        """A reshape of a reshape as one: two in a row would be fused into a kernel that copies."""
        if _is_call(call, "relax.reshape"):
            before = self.lookup_binding(call.args[0])
            if _is_call(before, "relax.reshape"):
                return relax.op.reshape(before.args[0], call.args[1])
        return call

    def _lowered(self, linear: Linear) -> relax.Call:
        kernel = self.kernels[linear.call]
        out = linear.call.ty_args[0]
        function = self.builder_.add_func(kernel.function, kernel.name)
        returned = relax.TensorType((out.shape[0], kernel.width), out.dtype)
        return relax.call_tir(function, [self.visit_expr(x) for x in linear.operands], returned)


@dataclass(frozen=True)
class Kernel:
    """width: of what it returns, [m, width]."""

    function: PrimFunc
    name: str
    width: int


def _kernel(target: Target, linear: Linear, silu: bool) -> Kernel:
    shape, operands = linear.shape, linear.operands
    x, _, _, scales = operands[:4]
    bias = len(operands) == 5
    try:
        function = dispatch.w4a16_linear(
            target,
            shape.K,
            shape.N,
            shape.group_size,
            str(x.ty.dtype),
            bias,
            str(linear.call.ty_args[0].dtype),
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
    return Kernel(with_unsigned_words(function), name, shape.N // 2 if silu else shape.N)
