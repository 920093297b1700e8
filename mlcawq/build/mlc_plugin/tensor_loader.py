"""mlc_llm's loader of AWQ weights, replaced by one that reads a tensor at a time.

mlc_llm's own holds whole files in memory, needs torch to read them, and finds out half-way that a
tensor is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mlc_llm.loader import ExternMapping, HuggingFaceLoader
from mlc_llm.loader.stats import Stats
from tvm.runtime import tensor as as_tensor

from mlcawq.build.loading_order import loading_order
from mlcawq.build.mlc_plugin.dequantized import DequantizingReader
from mlcawq.build.mlc_plugin.mapping import AwqMapping
from mlcawq.checkpoint.tensors import INDEX, SINGLE
from mlcawq.errors import UserError


def awq_loader(path: Path, extern_param_map: ExternMapping, quantize_param_map: Any = None) -> Any:
    """The loader for `extern_param_map`: ours for mappings of ours, mlc_llm's for its own."""
    if isinstance(extern_param_map, AwqMapping):
        return TensorLoader(path, extern_param_map)
    names = (INDEX, SINGLE) if path.is_dir() else ()
    file = next((path / name for name in names if (path / name).is_file()), path)
    return HuggingFaceLoader(file, extern_param_map, quantize_param_map)


class TensorLoader:
    """A loader as mlc_llm's convert step uses it.

    path: the checkpoint's folder, or a file in it. Raises UserError when the checkpoint does not
    hold exactly the tensors that the mapping needs.
    """

    def __init__(self, path: Path, mapping: AwqMapping) -> None:
        self.mapping = mapping
        unquantized = [source for name in mapping.shapes for source in mapping.param_map[name]]
        self.reader = DequantizingReader(path if path.is_dir() else path.parent, unquantized)
        mapping.check(self.reader)
        for module in mapping.left_out(self.reader):
            sys.stderr.write(
                f"warning: mlc_llm's model has no {module}: its tensors are left out\n"
            )
        self.stats = Stats(total_param_num=mapping.float_parameters(self.reader))

    def load(self, device: Any, preshard_funcs: None = None) -> Iterator[tuple[str, Any]]:
        """Every parameter by name, on `device`, in the order of `loading_order`.

        Raises UserError for a parameter with values that are not finite in its type, and for
        tensors that the model's mapping cannot be applied to.
        """
        sources = self.mapping.without_missing_zeros(self.reader)
        for name in loading_order(sources, self.reader):
            arrays = [self.reader.numpy(source) for source in sources[name]]
            with np.errstate(over="ignore"):  # reported below, by name
                try:
                    parameter = self.mapping.map_func[name](*arrays)
                except ValueError as error:
                    raise UserError.one(f"cannot be made: {error}", name) from error
            del arrays  # or they would be held while the parameter is written
            if parameter.dtype.kind == "f" and not np.isfinite(parameter).all():
                raise UserError.one(
                    f"{name} has values that are not finite as {parameter.dtype}",
                    str(self.reader.folder),
                    "use a quantization with f32 in its name, or rescale the checkpoint",
                )
            yield name, as_tensor(parameter, device=device)
