"""What AWQ's storage formats share: 4-bit integers with a zero point for each group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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

BITS = 4
_OTHERS = "--format compressed-tensors or fake holds them"
# AutoAWQ divides these activations by scales, whose names end in ".scales" as a linear's do.
_SCALED_ACTIVATIONS = (".act", ".gelu_impl")


class AwqStorage(ABC):
    """A version of AWQ's storage, as `quantization_config` calls it.

    group_sizes: those that the version's kernels compute with; None any, per channel included.
    in_multiple, out_multiple: what in_features and out_features have to be multiples of.
    scaled: zero points are stored times the scale, negated, in float16.
    """

    name: str
    version: str
    one_file: bool = False
    scales_activations: bool = True
    group_sizes: tuple[int, ...] | None = None
    in_multiple: int = 1
    out_multiple: int = 8
    scaled: bool = False

    @abstractmethod
    def layout(self, spec: LinearSpec) -> dict[str, Layout]:
        """The tensors of a linear by the last part of their names."""

    @abstractmethod
    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(in_features, out_features) of a linear whose qweight has that shape."""

    @abstractmethod
    def packed(self, weight: QuantizedWeight, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `layout`, with the scales [K/G, N] in float16."""

    @abstractmethod
    def codes(self, qweight: torch.Tensor) -> torch.Tensor:
        """qweight as stored -> integers, uint8 [K, N]."""

    @abstractmethod
    def unpacked_zeros(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """The zero points as stored -> [K/G, N]; where they are `scaled`, still so."""

    @abstractmethod
    def unpacked_scale(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """The scales as stored -> [K/G, N]."""

    @property
    def zeros_part(self) -> str:
        """The last part of the name of the zero points' tensor."""
        return "qzeros"

    def problems(self, linears: Mapping[str, LinearSpec]) -> Iterator[Problem]:
        """See `Format.problems`."""
        grids = {name: spec.grid for name, spec in linears.items()}
        other = {name: grid.bits for name, grid in grids.items() if grid.bits != BITS}
        if other:
            found = " and ".join(map(str, sorted(set(other.values()))))
            yield Problem(f"AWQ storage holds 4 bits, not {found}", listed(other), _OTHERS)
        active = [name for name, spec in linears.items() if spec.activation_bits is not None]
        if active:
            yield Problem(
                "AWQ storage has no quantized activations",
                listed(active),
                "--format compressed-tensors holds them",
            )
        try:
            config_group_size(linears)
        except ValueError as error:
            yield Problem(str(error), listed(linears), _OTHERS)
        if self.group_sizes is not None:
            odd = [name for name in grids if grids[name].group_size not in self.group_sizes]
            if odd:
                sizes = " and ".join(map(str, self.group_sizes))
                yield Problem(
                    f"the kernels of {self.name} compute with groups of {sizes} alone",
                    listed(odd),
                    f"quantize with --group-size {self.group_sizes[-1]}, or take --format awq",
                )
        for what, multiple, value in (
            ("in_features", self.in_multiple, lambda spec: spec.in_features),
            ("out_features", self.out_multiple, lambda spec: spec.out_features),
        ):
            odd = [name for name, spec in linears.items() if value(spec) % multiple]
            for size in sorted({value(linears[name]) for name in odd}):
                names = [name for name in odd if value(linears[name]) == size]
                kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
                yield Problem(
                    f"{what} {size} is not a multiple of {multiple}, which {self.name} packs",
                    listed(names),
                    "quantize with " + " ".join(f"--keep {kind}" for kind in kinds),
                )

    def tensors(
        self, name: str, weight: QuantizedWeight, spec: LinearSpec
    ) -> dict[str, torch.Tensor]:
        """See `Format.tensors`."""
        scale = stored_scale(weight, f"{name}.scales")
        found = self.packed(weight, scale)
        if not torch.isfinite(found[self.zeros_part]).all():
            raise UserError.one(
                "its scale times its zero point does not fit in float16, in which "
                f"{self.name} stores it",
                name,
                "--format awq stores zero points as integers",
            )
        return {f"{name}.{part}": tensor.contiguous() for part, tensor in found.items()}

    def bytes_of(self, spec: LinearSpec) -> int:
        """See `Format.bytes_of`."""
        return nbytes(self.layout(spec))

    def quantization_config(
        self, linears: Mapping[str, LinearSpec], kept: Sequence[str]
    ) -> dict[str, Any]:
        """config.json's entry, in AutoAWQ's terms.

        `zero_point` says whether zero points are stored. They always are, with symmetric integers
        too (8 everywhere): readers that are told otherwise refuse the file or look for another
        kernel.
        """
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": config_group_size(linears),
            "zero_point": True,
            "version": self.version,
            "modules_to_not_convert": short_names(kept, linears),
        }

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See `Format.reads`."""
        return config.get("quant_method") == "awq" and config_version(config) == self.version

    def label(self, config: Mapping[str, Any]) -> str:
        """See `Format.label`."""
        size = config.get("group_size", config.get("q_group_size"))
        return f"{self.name} w{BITS} g{'channel' if size == -1 else size}"

    def linears(self, config: Mapping[str, Any], headers: Headers) -> dict[str, LinearSpec]:
        """See `Format.linears`."""
        group_size, problems = _config_problems(config)
        raise_all(problems)
        found: dict[str, LinearSpec] = {}
        for name in headers.names:
            prefix, _, part = name.rpartition(".")
            if part == "qweight":
                shape = tuple(headers.info(name).shape)
                if len(shape) != 2:
                    problems.append(Problem(f"shape {list(shape)}, not a matrix", name))
                    continue
                K, N = self.features(shape)
                size = K if group_size == -1 else group_size
                if not K or K % size:
                    problems.append(
                        Problem(f"in_features {K} is not a multiple of the group size {size}", name)
                    )
                    continue
                without = self._without_zeros(config, prefix, headers)
                spec = LinearSpec(K, N, IntegerGrid(BITS, size, symmetric=without))
                found[prefix] = spec
                wanted = {f"{prefix}.{key}": value for key, value in self.layout(spec).items()}
                if without:
                    del wanted[f"{prefix}.{self.zeros_part}"]
                problems.extend(layout_problems(wanted, headers))
            elif (
                part in ("qzeros", "scaled_zeros", "scales")
                and f"{prefix}.qweight" not in headers
                and not _is_activation_scale(name)
            ):
                problems.append(
                    Problem(
                        "tensor is missing", f"{prefix}.qweight", "download the checkpoint again"
                    )
                )
        if not found and not problems:
            problems.append(
                Problem(
                    "config.json says that the model is quantized with AWQ, and no tensor is",
                    "qweight",
                    "download the checkpoint again",
                )
            )
        raise_all(dict.fromkeys(problems))
        return found

    def _without_zeros(self, config: Mapping[str, Any], name: str, headers: Headers) -> bool:
        """Symmetric integers of AutoAWQ whose zero points, 8 everywhere, are left out."""
        given = config.get("zero_point", True)
        return not self.scaled and not given and f"{name}.{self.zeros_part}" not in headers

    def neutral(self, headers: Headers) -> list[str]:
        """See `Format.neutral`."""
        found = [name for name in headers.names if _is_activation_scale(name)]
        raise_all(
            Problem(
                "AutoAWQ has moved an AWQ scale behind this activation, which is not read",
                name,
                "quantize the original model with `mlcawq quantize`",
            )
            for name in found
            if (headers.numpy(name).astype(np.float32) != 1).any()
        )
        return found

    def parts(self, name: str, spec: LinearSpec) -> list[str]:
        """See `Format.parts`."""
        return [f"{name}.{part}" for part in self.layout(spec)]

    def zeros(self, name: str, spec: LinearSpec, get: Get) -> torch.Tensor:
        """See `Format.zeros`."""
        if spec.grid.symmetric:  # they may be left out, see _without_zeros
            return torch.full((spec.groups, spec.out_features), 8, dtype=torch.uint8)
        zeros = self.unpacked_zeros(spec, get(f"{name}.{self.zeros_part}"))
        if not self.scaled:
            return zeros
        scale = self.unpacked_scale(spec, get(f"{name}.scales")).float()
        ratio = torch.where(scale == 0, 0.0, -zeros.float() / scale)
        whole = ratio.round()
        # Rounding to float16 or bfloat16 moves a ratio of at most 15 by less than 0.1.
        if not bool(((whole - ratio).abs() < 0.1).all()) or whole.min() < 0 or whole.max() > 15:
            raise UserError.one(
                "holds zero points that are no whole numbers from 0 to 15",
                f"{name}.{self.zeros_part}",
            )
        return whole.to(torch.uint8)

    def read(self, name: str, spec: LinearSpec, get: Get) -> QuantizedWeight:
        """See `Format.read`."""
        return QuantizedWeight(
            self.codes(get(f"{name}.qweight")),
            self.unpacked_scale(spec, get(f"{name}.scales")).contiguous(),
            self.zeros(name, spec, get),
            spec.grid,
        )


def _is_activation_scale(name: str) -> bool:
    module, _, part = name.rpartition(".")
    return part == "scales" and module.endswith(_SCALED_ACTIVATIONS)


def config_version(config: Mapping[str, Any]) -> str:
    """The storage version that an AWQ `quantization_config` means; AutoAWQ's default is gemm.

    llm-awq's folders on the hub say so by `backend`, beside a version that means nothing.
    """
    if config.get("backend") == "llm-awq":
        return "llm-awq"
    return str(config.get("version") or config.get("format") or "gemm").lower()


def config_group_size(linears: Mapping[str, LinearSpec]) -> int:
    """The one group size of AWQ's config: -1 for per channel. Raises ValueError where they differ.

    A linear with as many input channels as a group has is either.
    """
    sizes = {spec.grid.group_size for spec in linears.values()}
    if len(sizes) == 1:
        return sizes.pop()
    if all(spec.groups == 1 for spec in linears.values()):
        return -1
    found = ", ".join(map(str, sorted(sizes)))
    raise ValueError(f"AWQ storage has one group size for all linears, not {found}")


def short_names(kept: Sequence[str], linears: Mapping[str, LinearSpec]) -> list[str]:
    """`modules_to_not_convert`: parts of names that are in every kept linear's and in no other's.

    AutoAWQ looks for them in names within a block, transformers and vLLM in full names: what a
    module is called inside its block serves all of them, where all blocks keep it.
    """
    result: list[str] = []
    for name in kept:
        if any(part in name for part in result):
            continue
        pieces = name.split(".")
        endings = [".".join(pieces[i:]) for i in reversed(range(len(pieces)))]
        free = (part for part in endings if not any(part in other for other in linears))
        result.append(next(free, name))
    return result


def _config_problems(config: Mapping[str, Any]) -> tuple[int, list[Problem]]:
    """The group size, and what is wrong with an AWQ config's integers."""
    # llm-awq wrote w_bit and q_group_size; AutoAWQ writes bits and group_size.
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    problems = []
    if bits != BITS:
        problems.append(Problem(f"AWQ with {bits!r} bits is not supported", "quantization_config"))
    if isinstance(size, bool) or not isinstance(size, int) or (size < 8 and size != -1):
        problems.append(Problem(f"AWQ group size {size!r} is not known", "quantization_config"))
        size = 0
    return size, problems
