"""Finding out what a path is, and handing it to whoever knows more."""

from __future__ import annotations

from pathlib import Path

from mlcawq.checkpoint.config import load_json
from mlcawq.errors import UserError
from mlcawq.inspection.checkpoints import describe_checkpoint
from mlcawq.inspection.description import Description, size
from mlcawq.inspection.files import describe_file
from mlcawq.inspection.models import describe_library, describe_model_folder

LIBRARY_SUFFIXES = (".so", ".dylib", ".dll")


def describe(path: Path) -> Description:
    """What `path` is. Raises UserError only when there is nothing at `path`."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError.one(
            "there is nothing here", str(path), "give a folder or a file on this machine"
        )
    if path.is_file():
        if path.suffix in LIBRARY_SUFFIXES:
            return describe_library(path)
        return describe_file(path)
    if (path / "mlc-chat-config.json").is_file():
        return describe_model_folder(path)
    if (path / "config.json").is_file():
        return describe_checkpoint(path)
    return _describe_other_folder(path)


def _describe_other_folder(path: Path) -> Description:
    if (path / "adapter_config.json").is_file():
        base = load_json(path / "adapter_config.json").get("base_model_name_or_path")
        return Description(
            path,
            "an adapter (LoRA), not a whole model",
            {"base model": base},
            next_step="merge it into its base model first (peft: merge_and_unload)",
        )
    files = sorted(file for file in path.iterdir() if file.is_file())
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return describe_file(ggufs[0])
    if (path / "tensor-cache.json").is_file():
        kind = "converted weights without mlc-chat-config.json"
        return Description(path, kind, next_step=f"mlcawq gen-config CHECKPOINT -o {path}")
    kind = "a folder without a model" if files else "an empty folder"
    facts = {"files": len(files), "bytes": size(sum(file.stat().st_size for file in files))}
    return Description(path, kind, facts if files else {})
