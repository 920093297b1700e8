"""From nothing to an engine in the least time: what does not need TVM begins before it is there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime_only import import_tvm_runtime
from mlcawq.engine.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from mlcawq.engine.engine import Engine


def open_engine(
    folder: Path, device: str, *, library: Path | None = None, **options: Any
) -> Engine:
    """An `Engine` with these options. Its tokenizer is read while TVM's runtime is imported; a
    folder that is not whole is refused before either. Raises UserError, as Engine does.
    """
    with _no_garbage():
        built = read_folder(folder, library)
        tokenizer = load_tokenizer(built)
        import_tvm_runtime()
        from mlcawq.engine.engine import Engine

        return Engine(built, device, tokenizer=tokenizer, **options)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """What is imported and loaded here stays to the end: looking through it for garbage, now and
    between tokens, would find nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
