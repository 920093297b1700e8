"""From what the user names (a folder or a hub name) to a folder that can be read."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.tensors import INDEX
from mlcawq.checkpoint.writing import ShardWriter, staged_folder
from mlcawq.errors import UserError

# Everything of a tokenizer and its chat template, in the forms that are in use.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json")
# Either is enough for a tokenizer: the fast one's file, or what it can be made from.
_TOKENIZER_CORE = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(model: str, *, trust_pickle: bool = False, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded from the hub where `model` is no folder.

    Weights must be safetensors. A checkpoint that has only pickle files is refused, since reading
    one can run code; with `trust_pickle` it is converted once into the user's cache, tensors only.
    Raises UserError for whatever is not a checkpoint.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = _download(model, revision, trust_pickle)
    if folder.is_file():
        raise _no_folder(folder)
    if not (folder / "config.json").is_file():
        raise _no_checkpoint(folder)
    if _has_safetensors(folder):
        return folder
    pickles = _pickles(folder)
    if not pickles:
        raise UserError.one(
            "no weights (*.safetensors)", str(folder), "download the checkpoint again"
        )
    if not trust_pickle:
        raise UserError.one(
            f"the weights are pickle files ({pickles[0].name}), which can run code when read",
            str(folder),
            "use a safetensors version of the model, or pass --trust-pickle if you trust its "
            "author",
        )
    return _convert_pickles(folder, pickles)


def require_tokenizer(folder: Path) -> None:
    """Raise UserError when a folder holds no tokenizer in any of the forms that are read."""
    folder = Path(folder)
    for files in _TOKENIZER_CORE:
        if all((folder / file).is_file() for file in files):
            return
    raise UserError.one(
        "no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)",
        str(folder),
        "copy the tokenizer files of the original model into the folder",
    )


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a model folder. Never runs code that the folder brings.

    Raises UserError when there is none, or none that transformers can read.
    """
    from transformers import AutoTokenizer

    require_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for every broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError.one(
            f"the tokenizer cannot be read: {reason}",
            str(folder),
            "copy the tokenizer files of the original model into the folder",
        ) from error


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config; returns the names copied."""
    copied = [name for name in SIDE_FILES if (Path(source) / name).is_file()]
    for name in copied:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return copied


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _pickles(folder: Path) -> list[Path]:
    """The weights; beside pytorch_model*.bin, a trainer's *.pt and *.pth are something else."""
    return sorted(folder.glob("pytorch_model*.bin")) or sorted(
        path for pattern in ("*.pt", "*.pth") for path in folder.glob(pattern)
    )


def _no_folder(path: Path) -> UserError:
    if path.suffix == ".gguf":
        return UserError.one(
            "GGUF files are not read",
            str(path),
            "give the Hugging Face checkpoint that it was made from",
        )
    return UserError.one("is a file; a checkpoint is a folder", str(path))


def _no_checkpoint(folder: Path) -> UserError:
    if (folder / "mlc-chat-config.json").is_file():
        return UserError.one(
            "this is a built MLC folder, not a Hugging Face checkpoint",
            str(folder),
            f"to talk to it: mlcawq chat {folder}",
        )
    if any(folder.glob("*.gguf")):
        return _no_folder(next(folder.glob("*.gguf")))
    return UserError.one(
        "no config.json: this is not a Hugging Face checkpoint",
        str(folder),
        "give the folder that holds config.json and *.safetensors, or a hub name",
    )


def _download(model: str, revision: str | None, trust_pickle: bool) -> Path:
    if model.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(model):
        raise UserError.one("no such folder", model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]
    if trust_pickle:
        patterns.append("pytorch_model*.bin")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError.one(
            f"neither a folder here nor reachable on the hub ({reason})",
            model,
            "check the name and the network; for a gated model run `hf auth login` first",
        ) from None


def _convert_pickles(folder: Path, pickles: list[Path]) -> Path:
    """Tensors of pickle files as safetensors, in the user's cache. Never runs pickled code."""
    import torch

    stamp = hashlib.sha256()
    beside = [folder / name for name in ("config.json", *SIDE_FILES)]
    for path in [*pickles, *(path for path in beside if path.is_file())]:
        status = path.stat()
        stamp.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlcawq"
    target = cache / "converted" / stamp.hexdigest()[:16]
    if (target / "config.json").is_file():
        return target
    with staged_folder(target) as stage:
        copy_side_files(folder, stage)
        shutil.copyfile(folder / "config.json", stage / "config.json")
        writer = ShardWriter(stage)
        for path in pickles:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise UserError.one(
                    f"not a plain file of tensors ({type(error).__name__})", str(path)
                ) from error
            if not isinstance(tensors, dict) or not all(
                isinstance(tensor, torch.Tensor) for tensor in tensors.values()
            ):
                raise UserError.one(
                    "holds more than tensors by name",
                    str(path),
                    "save the model's state_dict alone, or use a safetensors version of it",
                )
            for name, tensor in tensors.items():
                # Tied tensors share storage, which safetensors refuses: each gets its own.
                writer.add(name, tensor.clone())
        writer.close()
    return target
