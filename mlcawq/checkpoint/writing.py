"""Writing folders that appear whole or not at all, and weights in shards of bounded size."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlcawq.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

_FRESH_SECONDS = 10.0


def check_output(out: Path, *, overwrite: bool = False) -> None:
    """Raise UserError when a result could not be placed at `out`; call it before long work."""
    out = _absolute(out)
    _check_path(out)
    if os.path.ismount(out):
        raise UserError.one(
            "a mounted folder cannot be replaced as a whole",
            str(out),
            f"name a folder in it: -o {out / 'model'}",
        )
    # The folder is written beside its place, so it is the parent that must allow writing.
    _check_permission(out.parent)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError.one(
            "the output folder exists and is not empty",
            str(out),
            "choose another -o, or pass --overwrite to replace it",
        )


def replacing_problems(src: Path, out: Path, overwrite: bool) -> Iterator[Problem]:
    """--overwrite replaces an earlier result, never the original or a folder of other things."""
    place, source = out.resolve(), src.resolve()
    if place == source or place in source.parents:
        yield Problem("the output would replace the original model", str(out), "choose another -o")
    elif overwrite and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        yield Problem(
            "--overwrite replaces model folders only, and there is no config.json",
            str(out),
            "choose another -o, or remove the folder yourself",
        )


def check_folder(folder: Path) -> None:
    """Raise UserError when files cannot be added to `folder`, which need not exist yet."""
    folder = _absolute(folder)
    _check_path(folder)
    _check_permission(folder)


def _check_path(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            what = "is a file" if path.is_file() else "is in the way, and no folder"
            raise UserError.one(f"{what}; a folder is written here", str(path), "choose another -o")


def _check_permission(folder: Path) -> None:
    place = _existing_parent(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError.one("no permission to write there", str(place), "choose another -o")


def scratch_folder(parent: Path, prefix: str) -> Path:
    """A new empty folder in `parent`, which is made where it lacks.

    Raises UserError where the system does not allow it, whatever the permissions say.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise UserError.one(
            f"nothing can be written there ({error.strerror})", str(parent), "choose another -o"
        ) from error


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Work in a temporary sibling of `out`; on success it becomes `out` by a rename.

    Whatever ends the block early, an interrupt included, removes the temporary folder and leaves
    an earlier `out` as it was; what a killed process has left is removed by the next one. A full
    disk is raised as UserError.
    """
    out = _absolute(out)
    check_output(out, overwrite=overwrite)
    _clear_abandoned(out)
    stage = scratch_folder(out.parent, f".{out.name}.partial-")
    stage.chmod(0o777 & ~_umask())
    lock = _locked(stage)
    try:
        yield stage
        sync_tree(stage)
        _replace(stage, out)
    except Exception as error:
        if is_disk_full(error):
            raise disk_error(error, out) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle whose lock on `folder` ends with this process, or None where another holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(handle)
        return None
    return handle


def _clear_abandoned(out: Path) -> None:
    """Remove the temporary siblings of `out` whose processes were killed: nobody locks them."""
    for stage in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        # One that was made just now may not be locked yet.
        if stage.is_dir() and time.time() - stage.stat().st_ctime > _FRESH_SECONDS:
            lock = _locked(stage)
            if lock is not None:
                shutil.rmtree(stage, ignore_errors=True)
                os.close(lock)


def disk_error(error: Exception, out: Path) -> Exception:
    """`error` as a UserError where it means that the disk is full, else `error` itself."""
    if is_disk_full(error):
        return UserError.one(
            "the disk is full; nothing was written",
            str(out),
            "free some space, or choose another -o",
        )
    return error


def is_disk_full(error: Exception) -> bool:
    """Whether an error of the system, or one that safetensors made of it, means a full disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if type(error).__name__ != "SafetensorError":
        return False
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


def _replace(stage: Path, out: Path) -> None:
    if out.exists():
        # A folder cannot be renamed onto a full one: the old one steps aside, and comes back
        # should the second rename fail.
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
        try:
            out.rename(old)
            stage.rename(out)
        except BaseException:  # an interrupt may come between the two
            if not out.exists():
                old.rename(out)
            raise
        finally:
            if out.exists():
                shutil.rmtree(old.parent, ignore_errors=True)
    else:
        stage.rename(out)
    _sync(out.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step that survives a crash."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """As `write_file`, for a JSON document."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Force every file below `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that would hold `path`."""
    return shutil.disk_usage(_existing_parent(Path(path))).free


def _absolute(path: Path) -> Path:
    # Unlike Path.absolute, this leaves no ".." at the end: a folder is renamed to its last part.
    return Path(os.path.abspath(path))


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class ShardWriter:
    """Weights into model-0000i-of-0000n.safetensors and their index, as transformers names them.

    Holds at most one shard of `max_shard_bytes` in memory. Tensors are torch or numpy; the order
    of `add` is the order on disk, so equal calls give equal bytes. Call `close` at the end; one
    shard alone becomes model.safetensors without an index.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 4 * 2**30) -> None:
        self.folder = Path(folder)
        self._limit = max_shard_bytes
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor | np.ndarray) -> None:
        """Queue a tensor; writes a shard to disk when it is full."""
        size = int(tensor.nbytes)
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"shard-{len(self._shards)}.partial"
        tensors = {name: _as_torch(tensor) for name, tensor in self._pending.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        self._shards.append(list(tensors))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> list[Path]:
        """Write what is left, give the shards their final names; returns their paths."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        paths = []
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            if count == 1:
                file = "model.safetensors"
            path = self.folder / file
            (self.folder / f"shard-{i}.partial").rename(path)
            paths.append(path)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.folder / "model.safetensors.index.json", index)
        return paths


def _as_torch(tensor: torch.Tensor | np.ndarray) -> torch.Tensor:
    import torch

    if isinstance(tensor, np.ndarray):
        if tensor.dtype.name == "bfloat16":
            return torch.from_numpy(tensor.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(tensor))
    return tensor.detach().contiguous().cpu()
