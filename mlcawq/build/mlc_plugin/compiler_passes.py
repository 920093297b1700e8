"""mlc_llm's compiler passes on a TVM whose functions have no `buffer_map`.

From 0.26 on, buffers are a function's parameters themselves, and scalars stand among a call's
arguments before what it returns. mlc_llm of July 2026 was written for the form before. What it
reads is given the old name; what it writes is replaced by code for the new form.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import IRModule, relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.script import tirx as T  # noqa: N812 - TVMScript's own name for it


def install() -> None:
    """Make mlc_llm's pipeline run here; nothing where TVM's functions have the old form."""
    if hasattr(tirx.PrimFunc, "buffer_map"):
        return
    from mlc_llm.compiler_pass import attach_sampler, pipeline
    from tvm.s_tir.dlight import cpu

    # This TVM's schedule for them gathers 128 rows of weights at a time, unrolled 128 times, and
    # LLVM does not come to an end with that: without one the kernels compile in no time.
    cpu.GEMV.apply = lambda _rule, _function, _target, _tunable: None

    tirx.PrimFunc.buffer_map = property(
        lambda function: {param: param for param in _buffers(function.params)}
    )
    pipeline.LiftTIRGlobalBufferAlloc = LiftGlobalBuffers
    attach_sampler.full = _fill


@T.prim_func(s_tir=True)
def _fill(value: T.int64, result_handle: T.handle) -> None:
    """result [n, 1] int32, every element `value`."""
    n = T.int64()
    result = T.match_buffer(result_handle, (n, 1), "int32")
    for i in T.serial(n):
        with T.sblock("fill"):
            vi = T.axis.spatial(n, i)
            result[vi, 0] = T.Cast("int32", value)


@tvm.transform.module_pass(opt_level=0, name="LiftGlobalBuffers")
class LiftGlobalBuffers:
    """Buffers in global memory that a kernel's function allocates for itself become outputs of it.

    Relax then plans their memory together with everything else's.
    """

    def transform_module(self, module: IRModule, _context: Any) -> IRModule:
        return _Lifting(module).run()


@mutator
class _Lifting(PyExprMutator):
    def __init__(self, module: IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.lifted: dict[Any, tuple[Any, tirx.PrimFunc, list[Any]]] = {}

    def run(self) -> IRModule:
        for name, function in self.module.functions_items():
            if isinstance(function, tirx.PrimFunc):
                changed, buffers = lift_buffers(function)
                if buffers:
                    new = self.builder_.add_func(changed, name.name_hint)
                    self.lifted[name] = (new, function, buffers)
        for name, function in self.module.functions_items():
            if isinstance(function, relax.Function) and self.lifted:
                self.builder_.update_func(name, self.visit_expr(function))
        return relax.transform.DeadCodeElimination()(self.builder_.get())

    def visit_call_(self, call: relax.Call) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op != tvm.ir.Op.get("relax.call_tir") or call.args[0] not in self.lifted:
            return call
        new, function, buffers = self.lifted[call.args[0]]
        (returned,) = call.ty_args
        one = isinstance(returned, relax.TensorType)
        outputs = [returned] if one else list(returned.fields)
        sizes = _sizes(function, [*call.args[1], *outputs])
        scratch = [
            relax.TensorType(
                [tirx.stmt_functor.substitute(size, sizes) for size in buffer.shape], buffer.dtype
            )
            for buffer in buffers
        ]
        longer = self.builder_.emit(relax.call_tir(new, call.args[1], [*outputs, *scratch]))
        parts = [
            self.builder_.emit(relax.TupleGetItem(longer, index)) for index in range(len(outputs))
        ]
        return parts[0] if one else relax.Tuple(parts)


def lift_buffers(function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[Any]]:
    """`function` with its root block's global buffers as last parameters, and those buffers."""
    if not isinstance(function.body, tirx.SBlockRealize):
        return function, []
    root = function.body.block
    lifted = [buffer for buffer in root.alloc_buffers if buffer.scope() == "global"]
    if not lifted:
        return function, []
    kept = [buffer for buffer in root.alloc_buffers if buffer.scope() != "global"]
    block = tirx.SBlock(
        [], [], [], "root", root.body, alloc_buffers=kept, annotations=root.annotations
    )
    body = tirx.SBlockRealize([], True, block)
    params = [*function.params, *lifted]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs), lifted


def _sizes(function: tirx.PrimFunc, arguments: list[Any]) -> dict[Any, Any]:
    """What the symbolic sizes of `function` are in a call; arguments: of the call, then the types
    of what it returns.
    """
    found = {}
    for param, argument in zip(function.params, arguments, strict=True):
        if not _is_buffer(param):
            found[param] = argument
            continue
        type_ = argument if isinstance(argument, relax.TensorType) else argument.ty
        for size, given in zip(param.shape, type_.shape.values, strict=True):
            if isinstance(size, tirx.Var):
                found[size] = given
    return found


def _buffers(params: Any) -> list[Any]:
    return [param for param in params if _is_buffer(param)]


def _is_buffer(param: Any) -> bool:
    from tvm.tirx.buffer import is_buffer_var

    return bool(is_buffer_var(param))
