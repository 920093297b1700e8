"""mlc_llm without its compiled module, on a TVM that it was not written for.

The three steps are Python; what they take from the compiled module is small and is given here.
Every replacement is made only where the original is missing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlcawq.errors import UserError

_MODULE = "mlc_llm_module"  # the library that the compiler side loads; "mlc_llm" is the runtime's
_SKIP = "SKIP_LOADING_MLCLLM_SO"  # mlc_llm's own switch


def import_mlc_llm() -> None:
    """Import mlc_llm, with or without its compiled module. Raises UserError where it is absent."""
    spec = importlib.util.find_spec("mlc_llm")
    if spec is None or spec.origin is None:
        raise UserError.one(
            "mlc_llm is not installed in this interpreter",
            fix="run this with the Python of an environment that has it",
        )
    import tvm  # noqa: F401  (the compiled module is linked against TVM's libraries)

    if not _module_loads(Path(spec.origin).parent):
        os.environ[_SKIP] = "1"
    with _unregistered_types_allowed():
        importlib.import_module("mlc_llm.__main__")


def install() -> None:
    """After `import_mlc_llm`: what the steps take from the compiled module and do not find."""
    _provide_tokenizer_info()
    _check_devices_in_process()
    _provide_name_hint()


def _module_loads(package: Path) -> bool:
    spec = importlib.util.spec_from_file_location("_mlc_llm_libinfo", package / "libinfo.py")
    if spec is None or spec.loader is None or os.environ.get(_SKIP, "0") != "0":
        return False
    libinfo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(libinfo)
    for path in libinfo.find_lib_path(_MODULE, optional=True)[:1]:
        try:
            ctypes.CDLL(path)
        except OSError:
            return False
        return True
    return False


@contextmanager
def _unregistered_types_allowed() -> Iterator[None]:
    """Python classes of types that only the compiled module declares stay plain classes."""
    import tvm_ffi

    register = tvm_ffi.register_object

    def tolerant(type_key: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(type_key, str) or not type_key.startswith("mlc."):
            return register(type_key, *args, **kwargs)

        def decorate(cls: type) -> type:
            try:
                return register(type_key, *args, **kwargs)(cls)
            except ValueError:  # "Cannot find object type index"
                return cls

        return decorate

    tvm_ffi.register_object = tolerant
    try:
        yield
    finally:
        tvm_ffi.register_object = register


def _provide_tokenizer_info() -> None:
    from mlc_llm.tokenizers import _ffi_api

    if hasattr(_ffi_api, "DetectTokenizerInfo"):
        return

    def detect(folder: str) -> str:
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            return "{}"  # mlc_llm's defaults
        from mlcawq.build.tokenizer_files import tokenizer_info

        return json.dumps(tokenizer_info(file))

    _ffi_api.DetectTokenizerInfo = detect


def _check_devices_in_process() -> None:
    """mlc_llm asks a child process, which cannot import mlc_llm without its compiled module."""
    if os.environ.get(_SKIP, "0") == "0":
        return
    from mlc_llm.support import auto_device

    auto_device._device_exists = _device_exists


def _device_exists(device: Any) -> bool:
    try:
        return bool(device.exist)
    except Exception:  # a TVM without this kind of device raises whatever its registry does
        return False


def _provide_name_hint() -> None:
    """TVM 0.26 calls the name of a Relax variable `name`; mlc_llm's passes read `name_hint`."""
    from tvm import relax

    if not hasattr(relax.Var, "name_hint"):
        relax.Var.name_hint = property(lambda variable: variable.name)
