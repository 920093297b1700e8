"""AWQ linears in a Relax module become kernels; needs TVM only, no mlc_llm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from mlcawq.build.mlc_plugin.lowering import CALL, lower_awq_linears
from mlcawq.errors import UserError
from tests.tir_kernels.kernels import HOST, relative_error
from tir_kernels import reference
from tir_kernels._tvm import Target
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

WEBGPU = Target({"kind": "webgpu"}, host={"kind": "llvm"})
GATE_UP, DOWN = LinearShape(64, 256, 32), LinearShape(128, 64, 32)
After = Callable[[nn.Tensor], nn.Tensor]


class Linear(nn.Module):
    """As the plug-in's: parameters of a layout and one call, between two reshapes."""

    def __init__(self, shape: LinearShape, layout: str, bias: bool = False) -> None:
        arrays = shape.parameters(layout)
        self.shape = shape
        self.qweight = nn.Parameter(arrays["qweight"][0], "uint32")
        self.qzeros = nn.Parameter(arrays["qzeros"][0], "uint32")
        self.scales = nn.Parameter(*arrays["scales"])
        self.bias = nn.Parameter((shape.N,), "float16") if bias else None

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        batch, rows, _ = x.shape
        flat = op.reshape(x, (batch * rows, self.shape.K))
        weights = [self.qweight, self.qzeros, self.scales]
        weights += [] if self.bias is None else [self.bias]
        out = nn.Tensor.placeholder((batch * rows, self.shape.N), "float16")
        return op.reshape(op.extern(CALL, [flat, *weights], out), (batch, rows, self.shape.N))


def swiglu(x: nn.Tensor) -> nn.Tensor:
    gate, up = op.split(x, 2, axis=-1)
    return op.silu(gate) * up


def up_first(x: nn.Tensor) -> nn.Tensor:
    gate, up = op.split(x, 2, axis=-1)
    return up * op.silu(gate)


def gelu(x: nn.Tensor) -> nn.Tensor:
    gate, up = op.split(x, 2, axis=-1)
    return op.gelu(gate) * up


def swapped(x: nn.Tensor) -> nn.Tensor:
    gate, up = op.split(x, 2, axis=-1)
    return op.silu(up) * gate


def used_twice(x: nn.Tensor) -> nn.Tensor:
    gate, up = op.split(x, 2, axis=-1)
    return op.silu(gate) * up + up


class MLP(nn.Module):
    def __init__(self, layout: str, after: After, bias: bool = False) -> None:
        self.gate_up_proj = Linear(GATE_UP, layout, bias)
        self.down_proj = Linear(DOWN, layout)
        self.after = after

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.down_proj(self.after(self.gate_up_proj(x)))


def traced(layout: str, after: After, bias: bool = False) -> tuple[tvm.IRModule, list[str]]:
    """The module of an MLP, and the names of its parameters."""
    spec = {
        "forward": {
            "x": nn.spec.Tensor([1, "rows", GATE_UP.K], "float16"),
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }
    }
    module, params = MLP(layout, after, bias).export_tvm(spec=spec)
    return module, [name for name, _ in params]


def lowered(target: Target, layout: str, after: After, bias: bool = False) -> tvm.IRModule:
    module, names = traced(layout, after, bias)
    return lower_awq_linears(module, target, names, lambda name: name == "gate_up_proj")


def calls(module: tvm.IRModule) -> list[str]:
    """What the forward function calls, in its order."""
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call):
            named = node.op.name == "relax.call_tir"
            found.append(node.args[0].name_hint if named else node.op.name.removeprefix("relax."))

    relax.analysis.post_order_visit(module["forward"], visit)
    return found


@pytest.mark.parametrize(("after", "bias"), [(swiglu, False), (up_first, True)])
def test_silu_is_fused_where_gate_and_up_are_interleaved(after: After, bias: bool) -> None:
    assert calls(lowered(WEBGPU, TILED, after, bias)) == [
        "reshape",
        f"w4a16_64x256_g32{'_bias' if bias else ''}_silu",
        "reshape",
        "w4a16_128x64_g32",
        "reshape",
    ]


@pytest.mark.parametrize("after", [gelu, swapped, used_twice])
def test_interleaved_weights_that_are_used_otherwise_are_refused(after: After) -> None:
    with pytest.raises(UserError, match=r"gate_up_proj: in the layout n16k64.*does not compute"):
        lowered(WEBGPU, TILED, after)
    module, names = traced(TILED, after)
    # Without interleaving the order of outputs is the stock one, and any use is right.
    plain = calls(lower_awq_linears(module, WEBGPU, names, lambda name: False))
    assert plain[:3] == ["reshape", "w4a16_64x256_g32", "reshape"]


def test_a_type_without_kernels_is_refused() -> None:
    target = Target({"kind": "llvm"})
    with pytest.raises(UserError, match=r"gate_up_proj: there is no kernel for it: the CPU"):
        lowered(target, TILED, swiglu)


def test_the_stock_layout_computes_the_same() -> None:
    module = lowered(HOST, AUTOAWQ, swiglu, bias=True)
    assert [name for name in calls(module) if name.startswith("w4a16")] == [
        "w4a16_64x256_g32_bias",
        "w4a16_128x64_g32",
    ]
    with HOST:
        machine = relax.VirtualMachine(tvm.compile(module, target=HOST), tvm.cpu())
    rng = np.random.default_rng(0)
    arrays = []
    for shape in (GATE_UP, DOWN):
        sizes = [size for size, _ in shape.parameters(AUTOAWQ).values()]
        words = [rng.integers(0, 2**32, size, dtype=np.uint32) for size in sizes[:2]]
        scales = (rng.random(sizes[2]) * 0.02 + 0.001).astype(np.float16)
        offset = rng.standard_normal(shape.N).astype(np.float16)
        arrays.append([*words, scales, *([offset] if shape is GATE_UP else [])])
    x = rng.standard_normal((1, 5, GATE_UP.K)).astype(np.float16)
    given = [tvm.runtime.tensor(array) for array in [*arrays[0], *arrays[1]]]
    got = machine["forward"](tvm.runtime.tensor(x), given).numpy()[0]

    def linear(rows: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        qweight, qzeros, scales, *offset = parts
        words = (qweight.view(np.int32), qzeros.view(np.int32))
        return reference.w4a16_linear(rows, *words, scales, offset[0] if offset else None)

    gate, up = np.split(linear(x[0], arrays[0]).astype(np.float64), 2, axis=1)
    hidden = (gate / (1 + np.exp(-gate)) * up).astype(np.float16)
    assert relative_error(got, linear(hidden, arrays[1])) < 5e-3
