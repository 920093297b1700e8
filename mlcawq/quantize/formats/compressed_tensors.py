"""compressed-tensors, the format of llm-compressor, vLLM and transformers, through its library.

"pack-quantized", weights alone: weight_packed int32 [N, ceil(K * bits / 32)], integers as one
stream of bits along the input channels; weight_scale float16 [N, K/G]; weight_shape; and, where
not symmetric, weight_zero_point int32 [ceil(N * bits / 32), K/G], packed along the output channels.
"int-quantized", weights and activations: weight int8 [N, K], weight_scale float16 [N, 1].
Integers are signed there: zero is our middle.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.quantize.formats.base import (
    Get,
    Headers,
    Layout,
    LinearSpec,
    layout_problems,
    listed,
    nbytes,
    stored_scale,
)
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight
from mlcawq.quantize.patterns import kind_of

_METHOD = "compressed-tensors"
_PACKED, _INT8 = "pack-quantized", "int-quantized"
_MISSING = Problem(
    "the compressed-tensors library is not installed",
    "--format compressed-tensors",
    "pip install 'mlcawq[compressed-tensors]' (Python 3.11 or later)",
)
# Output channels packed at a time: the library works in int32.
_ROWS = 1024
_WHERE = "quantization_config"


class CompressedTensors:
    """See the module."""

    name = _METHOD
    one_file = False
    scales_activations = False

    def problems(self, linears: Mapping[str, LinearSpec]) -> Iterator[Problem]:
        """See `Format.problems`."""
        if not _installed():
            yield _MISSING
        active = {name: spec for name, spec in linears.items() if spec.activation_bits is not None}
        unfit = [
            name
            for name, spec in active.items()
            if spec.activation_bits != 8
            or spec.grid.bits != 8
            or spec.groups != 1
            or not spec.grid.symmetric
        ]
        if unfit:
            yield Problem(
                "8-bit activations go with symmetric 8-bit weights, one scale for each output "
                "channel",
                listed(unfit),
                "--bits 8 --group-size channel --symmetric, without overrides for these",
            )

    def tensors(
        self, name: str, weight: QuantizedWeight, spec: LinearSpec
    ) -> dict[str, torch.Tensor]:
        """See `Format.tensors`."""
        bits, middle = spec.grid.bits, _middle(spec.grid)
        scale = stored_scale(weight, f"{name}.weight_scale").T.contiguous()
        if spec.activation_bits is not None:
            codes = _signed(weight.codes.T, middle).contiguous()
            return {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        pack = _packing().pack_to_int32
        rows = weight.codes.T.split(_ROWS)
        parts = {
            "weight_packed": torch.cat([pack(_signed(part, middle), bits) for part in rows]),
            "weight_scale": scale,
            "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
        }
        if not spec.grid.symmetric:
            zeros = pack(_signed(weight.zero.T, middle), bits, packed_dim=0)
            parts["weight_zero_point"] = zeros.contiguous()
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def bytes_of(self, spec: LinearSpec) -> int:
        """See `Format.bytes_of`."""
        return nbytes(_layout(spec))

    def quantization_config(
        self, linears: Mapping[str, LinearSpec], kept: Sequence[str]
    ) -> dict[str, Any]:
        """config.json's entry: one group of linears for each kind of integers.

        The commonest kind is meant by "Linear", others by name, which goes first where both match.
        """
        kinds: dict[_Kind, list[str]] = {}
        for name, kind in _kinds(linears).items():
            kinds.setdefault(kind, []).append(name)
        kinds = dict(sorted(kinds.items(), key=lambda item: -len(item[1])))
        groups = {}
        for i, (kind, names) in enumerate(kinds.items()):
            targets = _targets(names, [*linears, *kept]) if i else ["Linear"]
            groups[f"group_{i}"] = _scheme(targets, kind)
        formats = {group["format"] for group in groups.values()}
        return {
            "config_groups": groups,
            "quant_method": _METHOD,
            "kv_cache_scheme": None,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(kept),
        }

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See `Format.reads`."""
        return config.get("quant_method") == _METHOD

    def label(self, config: Mapping[str, Any]) -> str:
        """See `Format.label`."""
        kinds = dict.fromkeys(kind for _, kind in _config_groups(config))
        words = [
            f"w{kind.bits}{'a8' if kind.activation_bits else ''} g{kind.group_size or 'channel'}"
            for kind in kinds
        ]
        return f"{self.name} {', '.join(words)}"

    def linears(self, config: Mapping[str, Any], headers: Headers) -> dict[str, LinearSpec]:
        """See `Format.linears`."""
        groups = _config_groups(config)
        found: dict[str, LinearSpec] = {}
        problems: list[Problem] = []
        for name in headers.names:
            prefix, _, part = name.rpartition(".")
            if part == "weight_scale":
                spec = self._spec(prefix, groups, headers, problems)
                if spec is not None:
                    found[prefix] = spec
                    wanted = {f"{prefix}.{key}": value for key, value in _layout(spec).items()}
                    problems.extend(layout_problems(wanted, headers))
            elif part in ("weight_packed", "weight_zero_point") and (
                f"{prefix}.weight_scale" not in headers
            ):
                again = "download the checkpoint again"
                problems.append(Problem("tensor is missing", f"{prefix}.weight_scale", again))
            elif part in ("weight_g_idx", "input_scale", "weight_global_scale", "k_scale"):
                problems.append(Problem("what this tensor does is not supported", kind_of(name)))
        if not found and not problems:
            problems.append(
                Problem(
                    "config.json says that the model is quantized, and no tensor is",
                    "weight_scale",
                    "download the checkpoint again",
                )
            )
        raise_all(dict.fromkeys(problems))
        return found

    def _spec(
        self,
        name: str,
        groups: Sequence[tuple[list[str], _Kind]],
        headers: Headers,
        problems: list[Problem],
    ) -> LinearSpec | None:
        """What the config and the tensors' shapes say of a linear, or None with a problem noted."""
        kind = _kind_of(name, groups)
        if kind is None:
            problems.append(
                Problem("no group of quantization_config means this quantized linear", name)
            )
            return None
        scale = headers.info(f"{name}.weight_scale").shape
        main = f"{name}.weight" if kind.activation_bits else f"{name}.weight_packed"
        if main not in headers:
            problems.append(Problem("tensor is missing", main, "download the checkpoint again"))
            return None
        shape = headers.info(main).shape
        if len(shape) != 2 or len(scale) != 2:
            problems.append(Problem(f"shape {list(shape)}, scales {list(scale)}", main))
            return None
        N, K = shape
        if not kind.activation_bits and f"{name}.weight_shape" in headers:
            K = int(headers.numpy(f"{name}.weight_shape")[-1])
        elif not kind.activation_bits:  # found missing by whoever looks at the layout
            K = kind.group_size * scale[1] or K * 32 // kind.bits
        size = kind.group_size or K
        if not K or K % size:
            problems.append(
                Problem(f"in_features {K} is not a multiple of the group size {size}", name)
            )
            return None
        grid = IntegerGrid(kind.bits, size, kind.symmetric)
        return LinearSpec(K, N, grid, kind.activation_bits)

    def neutral(self, headers: Headers) -> list[str]:
        """None."""
        return []

    def parts(self, name: str, spec: LinearSpec) -> list[str]:
        """See `Format.parts`."""
        return [f"{name}.{part}" for part in _layout(spec)]

    def zeros(self, name: str, spec: LinearSpec, get: Get) -> torch.Tensor:
        """See `Format.zeros`."""
        middle = _middle(spec.grid)
        if spec.grid.symmetric:
            return torch.full((spec.groups, spec.out_features), middle, dtype=torch.uint8)
        shape = torch.Size((spec.out_features, spec.groups))
        stored = get(f"{name}.weight_zero_point")
        zeros = _packing().unpack_from_int32(stored, spec.grid.bits, shape, packed_dim=0)
        return _unsigned(zeros, middle).T.contiguous()

    def read(self, name: str, spec: LinearSpec, get: Get) -> QuantizedWeight:
        """See `Format.read`."""
        middle = _middle(spec.grid)
        if spec.activation_bits is not None:
            codes = _unsigned(get(f"{name}.weight"), middle)
        else:
            unpack, parts = _packing().unpack_from_int32, []
            for part in get(f"{name}.weight_packed").split(_ROWS):
                shape = torch.Size((len(part), spec.in_features))
                parts.append(_unsigned(unpack(part, spec.grid.bits, shape), middle))
            codes = torch.cat(parts)
        scale = get(f"{name}.weight_scale").T.contiguous()
        return QuantizedWeight(codes.T.contiguous(), scale, self.zeros(name, spec, get), spec.grid)


class _Kind(NamedTuple):
    """The integers of a group of linears. group_size: 0 per channel; activation_bits: None none."""

    bits: int
    group_size: int
    symmetric: bool
    activation_bits: int | None


def _installed() -> bool:
    return importlib.util.find_spec("compressed_tensors") is not None


def _packing() -> Any:
    """The library's module that packs bits. Raises UserError where it is not installed."""
    if not _installed():
        raise UserError(_MISSING)
    from compressed_tensors.compressors.pack_quantized import helpers

    return helpers


def _middle(grid: IntegerGrid) -> int:
    return 2 ** (grid.bits - 1)


def _signed(codes: torch.Tensor, middle: int) -> torch.Tensor:
    """uint8 0..2^bits-1 -> int8 around 0."""
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _unsigned(values: torch.Tensor, middle: int) -> torch.Tensor:
    """The inverse of `_signed`."""
    return (values.to(torch.int16) + middle).to(torch.uint8)


def _layout(spec: LinearSpec) -> dict[str, Layout]:
    """The tensors of a linear by the last part of their names."""
    K, N, groups, bits = spec.in_features, spec.out_features, spec.groups, spec.grid.bits
    scale: Layout = ("F16", (N, groups))
    if spec.activation_bits is not None:
        return {"weight": ("I8", (N, K)), "weight_scale": scale}
    layout: dict[str, Layout] = {
        "weight_packed": ("I32", (N, -(-K * bits // 32))),
        "weight_scale": scale,
        "weight_shape": ("I64", (2,)),
    }
    if not spec.grid.symmetric:
        layout["weight_zero_point"] = ("I32", (-(-N * bits // 32), groups))
    return layout


def _kinds(linears: Mapping[str, LinearSpec]) -> dict[str, _Kind]:
    """What each linear is stored as.

    One group along all input channels is "per channel", unless other linears of a model with
    groups happen to be as wide: they are all told by their groups, then.
    """
    in_groups = {spec.grid.group_size for spec in linears.values() if spec.groups > 1}
    kinds = {}
    for name, spec in linears.items():
        size = spec.grid.group_size
        size = size if spec.groups > 1 or size in in_groups else 0
        kinds[name] = _Kind(spec.grid.bits, size, spec.grid.symmetric, spec.activation_bits)
    return kinds


def _scheme(targets: list[str], kind: _Kind) -> dict[str, Any]:
    """A group of `quantization_config`, as the library itself writes it."""
    if not _installed():
        raise UserError(_MISSING)
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    activations = None
    if kind.activation_bits:
        activations = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    weights = QuantizationArgs(
        num_bits=kind.bits,
        symmetric=kind.symmetric,
        strategy="group" if kind.group_size else "channel",
        group_size=kind.group_size or None,
    )
    scheme = QuantizationScheme(
        targets=targets,
        weights=weights,
        input_activations=activations,
        format=_INT8 if kind.activation_bits else _PACKED,
    )
    return dict(scheme.model_dump(mode="json"))


def _targets(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names of linears, those that are alike in all blocks as one regular expression."""
    chosen = set(names)
    apart = {kind_of(name) for name in others if name not in chosen}
    result = []
    for name in names:
        pattern = kind_of(name)
        if pattern in apart:
            result.append(name)
        else:
            result.append("re:" + re.escape(pattern).replace(r"\*", r"\d+") + "$")
    return list(dict.fromkeys(result))


def _config_groups(config: Mapping[str, Any]) -> list[tuple[list[str], _Kind]]:
    """(targets, kind) of every group. Raises UserError for what is not understood."""
    if not _installed():
        raise UserError(_MISSING)
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        parsed = QuantizationConfig.model_validate(dict(config))
    except (ValidationError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError.one(f"the library does not understand it: {reason}", _WHERE) from None
    problems: list[Problem] = []
    result = []
    for name, scheme in parsed.config_groups.items():
        weights, inputs = scheme.weights, scheme.input_activations
        where = f"{_WHERE}, {name}"
        if scheme.format not in (None, _PACKED, _INT8) or (
            scheme.format is None and parsed.format not in (_PACKED, _INT8)
        ):
            problems.append(
                Problem(f"format {scheme.format or parsed.format} is not supported", where)
            )
        elif weights is None or weights.type != "int" or not 2 <= weights.num_bits <= 8:
            problems.append(Problem("weights of other than 2 to 8 bit integers", where))
        elif weights.strategy not in ("group", "channel"):
            problems.append(Problem(f"strategy {weights.strategy} is not supported", where))
        elif inputs is not None and not (
            inputs.num_bits == 8
            and inputs.type == "int"
            and inputs.dynamic is True
            and inputs.strategy == "token"
            and inputs.symmetric
        ):
            problems.append(
                Problem("activations other than dynamic 8-bit integers by token", where)
            )
        elif inputs is None and (scheme.format or parsed.format) == _INT8:
            problems.append(Problem("8-bit weights without quantized activations", where))
        else:
            size = weights.group_size if weights.strategy == "group" else 0
            active = 8 if inputs is not None else None
            kind = _Kind(weights.num_bits, size or 0, weights.symmetric, active)
            result.append((list(scheme.targets), kind))
    if parsed.kv_cache_scheme is not None:
        problems.append(Problem("a quantized KV cache is not supported", _WHERE))
    raise_all(problems)
    return result


def _kind_of(name: str, groups: Sequence[tuple[list[str], _Kind]]) -> _Kind | None:
    """The kind of a linear: by its name where a group has it, else by its class."""
    for targets, kind in groups:
        for target in targets:
            pattern = target.removeprefix("re:")
            if pattern != target and re.match(pattern, name):
                return kind
            if target == name:
                return kind
    return next((kind for targets, kind in groups if "Linear" in targets), None)
