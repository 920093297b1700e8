"""A library for the CPU: one graph, and kernels for several levels of instruction sets.

The graph is TVM's bytecode and calls kernels by name. Which code a name stands for is decided when
the library is loaded (`mlcawq.build.cpu_dispatch`); any TVM runtime, mlc_llm's too, loads it like
every other library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlcawq.build.cpu_dispatch import dispatch_source
from mlcawq.build.cpu_kernels import Kernels, generate_kernels
from mlcawq.build.cpu_target import Variant, target_architecture
from mlcawq.build.link import Tools
from mlcawq.build.targets import target_record
from mlcawq.graph._tvm import IRModule, Target, tvm
from mlcawq.graph.pipeline import lower_module
from mlcawq.graph.settings import CompileSettings


@dataclass(frozen=True)
class CpuLibrary:
    """folder: where the object files are. target: the lowest variant's."""

    kernels: Kernels
    target: Target
    folder: Path

    def export_library(self, path: str, *, cc: str) -> None:
        """Link the library `path`, as TVM's executables do.

        Raises RuntimeError with the compiler's words when it fails.
        """
        source = self.folder / "dispatch.cc"
        architecture = target_architecture(self.target)
        source.write_text(dispatch_source(architecture, self.kernels.provided))
        self.kernels.executable.export_library(
            path,
            cc=cc,
            options=["-O2"],
            addons=[*map(str, self.kernels.objects), str(source)],
            fpack_imports=self._pack,
            workspace_dir=str(self.folder),
        )

    def _pack(self, root: Any, system_lib: bool, prefix: str, folder: str) -> str:
        """The bytecode as an object file; TVM by itself would write it as C."""
        pack = tvm.get_global_func("runtime.ModulePackImportsToLLVM")
        out = Path(folder) / "bytecode.o"
        pack(root, system_lib, str(self.target), prefix).write_to_file(str(out))
        return str(out)


def compile_for_cpu(
    graph: Callable[[Target], tuple[IRModule, dict[str, Any]]],
    settings: CompileSettings,
    variants: Sequence[Variant],
    tools: Tools,
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compile a library with `variants`, best last, and write it whole or not at all.

    graph: a target -> every function of the library before optimization, and its metadata. say:
    told what is going on. Returns the metadata. Raises UserError where a compiler fails, and what
    `graph` raises.
    """
    metadata: dict[str, Any] = {}

    def lower(variant: Variant) -> IRModule:
        say(f"graph for {variant.name}")
        module, described = graph(variant.target)
        metadata.update(described)
        metadata["target"] = target_record(variants[0].target)
        metadata["cpu_levels"] = [variant.name for variant in variants]
        return lower_module(module, settings, variant.target, metadata)

    with TemporaryDirectory() as folder:
        kernels = generate_kernels(variants, lower, Path(folder), say)
        say("link")
        tools.link(CpuLibrary(kernels, variants[0].target, Path(folder)), path)
    return metadata
