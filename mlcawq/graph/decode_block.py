"""One row through a decoder in two launches a block, where the target has a kernel for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlcawq.graph._tvm import PagedKVCache, PrimFunc, Target, nn, op
from mlcawq.graph.modules import AWQLinear, RMSNorm
from tir_kernels import dispatch
from tir_kernels.cpu.decode_block import DecodeBlock
from tir_kernels.foreign import with_unsigned_words
from tir_kernels.layouts import AUTOAWQ

Step = Callable[[nn.Tensor, PagedKVCache], nn.Tensor]


def single_launches(target: Target, layers: Any, norm: RMSNorm) -> Step | None:
    """(x [1, hidden], cache) -> the normed hidden state [1, hidden], as `Model.forward` computes
    it, with all that lies between two attentions in one kernel.

    None where there is no such kernel: on other targets and layouts, and where a linear is not
    quantized or, but for qkv, has a bias.
    """
    steps = [
        _step(target, layer, following, norm if following is None else following.input_layernorm)
        for layer, following in zip(layers, [*layers[1:], None], strict=True)
    ]
    if any(step is None for step in steps):
        return None

    def forward(x: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        residual = x
        qkv = layers[0].self_attn.project(layers[0].input_layernorm(x))
        for i, (layer, step) in enumerate(zip(layers, steps, strict=True)):
            attended = layer.self_attn.attend(qkv, cache, i)
            residual, qkv = step(attended, residual)
        return qkv

    return forward


def _step(target: Target, layer: Any, following: Any, next_norm: RMSNorm) -> Any:
    """(attended, residual) -> (residual, qkv of the following block), or, behind the last block,
    (residual, normed hidden state), of which the first means nothing.
    """
    linears = [layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
    if following is not None:
        linears.append(getattr(following.self_attn, following.self_attn.qkv))
    if not all(isinstance(linear, AWQLinear) for linear in linears):
        return None
    if any(linear.bias is not None for linear in linears[:3]):
        return None
    kernel = _kernel(target, linears, next_norm.eps)
    if kernel is None:
        return None
    o, gate_up, down = (linear.weights for linear in linears[:3])
    qkv = [] if following is None else linears[3].weights
    norm = layer.post_attention_layernorm
    weights = [*o, norm.weight, *gate_up, *down, next_norm.weight, *qkv]
    width = linears[-1].out_features
    name = "decode_block" if qkv else "last_decode_block"

    def step(attended: nn.Tensor, residual: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        out = nn.Tensor.placeholder((1, width), norm.dtype)
        arguments = [attended, residual, *weights]
        if not qkv:
            return residual, op.tensor_ir_op(kernel, name, arguments, out)
        outs = [nn.Tensor.placeholder(residual.shape, norm.dtype), out]
        result: Any = op.tensor_ir_op(kernel, name, arguments, outs)
        return result[0], result[1]

    return step


def _kernel(target: Target, linears: list[AWQLinear], eps: float) -> PrimFunc | None:
    """For o, gate_up, down and, but behind the last block, qkv."""
    o, gate_up, down = linears[:3]
    qkv = linears[3] if len(linears) > 3 else None
    quantization = o.quantization
    kernel = dispatch.decode_block(
        target,
        DecodeBlock(
            o.shape,
            gate_up.shape,
            down.shape,
            None if qkv is None else qkv.shape,
            qkv is not None and qkv.bias is not None,
        ),
        eps,
        quantization.dtype,
        layout=quantization.weight_layout or AUTOAWQ,
        scale_dtype=quantization.dtype,
        act_bits=quantization.roundings.act_bits,
    )
    return None if kernel is None else with_unsigned_words(kernel)
