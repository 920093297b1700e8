"""config.json of any decoder-only language model, read through transformers' own classes.

`checkpoint.config` reads the families that are compiled, strictly and with every value typed.
What is only run, block by block, needs a few numbers and transformers' config object.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import (
    DTYPES,
    load_json,
    parse_config,
)
from mlcawq.errors import Problem, UserError, raise_all

# Positions of a model that has no table of them and no length that it was trained for.
UNLIMITED = 2**31 - 1

# What configs call the longest input, the field's name first.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "model_max_length",
)


@dataclass(frozen=True)
class DecoderConfig:
    """What is known of a decoder before a tensor is read. Sizes are in elements.

    model_type: config.json's, that of the whole model where a vision tower is beside the decoder.
    max_position_embeddings: longest input in tokens; UNLIMITED where nothing limits it.
    dtype: the type of the unquantized tensors, as torch names it ("float16").
    quantization: config.json's `quantization_config`, in whatever format; None where it has none.
    raw: config.json as it was read.
    whole: transformers' config of the whole model.
    hf: transformers' config of the decoder; `whole` itself where there is nothing else.
    """

    model_type: str
    architectures: tuple[str, ...]
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    tie_word_embeddings: bool
    quantization: dict[str, Any] | None
    raw: dict[str, Any]
    whole: Any
    hf: Any

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        given = getattr(self.hf, "head_dim", None)
        return int(given or self.hidden_size // self.hf.num_attention_heads)

    @property
    def intermediate_size(self) -> int:
        """Width of a dense MLP; 4 times the hidden size where config.json does not say."""
        for key in ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"):
            if isinstance(given := getattr(self.hf, key, None), int):
                return given
        return 4 * self.hidden_size

    @property
    def plain_tokens(self) -> tuple[int, int]:
        """Two token ids that no config gives a meaning: no padding, no place for an image."""
        special: set[int] = set()
        for config in (self.whole, self.hf):
            for key, value in config.to_dict().items():
                if key.endswith(("token_id", "token_index", "token_ids")):
                    special.update(value if isinstance(value, list) else [value])
        first, second, *_ = (i for i in range(len(special) + 2) if i not in special)
        return first, second


def read_decoder_config(folder: Path) -> DecoderConfig:
    """The config of a checkpoint folder of any decoder. Runs no code but transformers' own.

    Raises UserError naming what is wrong; for a family that is compiled, everything that
    `checkpoint.config.read_config` finds.
    """
    from transformers import AutoConfig

    from mlcawq.families import FAMILIES

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError.one(
            "no config.json: this is not a Hugging Face checkpoint",
            str(folder),
            "give the folder that holds config.json and *.safetensors, or a hub name",
        )
    raw = load_json(path)
    if raw.get("model_type") in FAMILIES:
        # A build reads one storage format; here every one is.
        plain = {key: value for key, value in raw.items() if key != "quantization_config"}
        parse_config(plain, where=str(path))
    raise_all(_raw_problems(raw, str(path)))
    try:
        with _quiet():
            whole = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            text = whole.get_text_config(decoder=True)
    except Exception as error:  # each config class checks its values in its own way
        reason = str(error).strip().splitlines()
        raise UserError.one(
            f"transformers does not accept it: {reason[-1] if reason else type(error).__name__}",
            str(path),
        ) from None
    return _described(raw, whole, text, str(path))


def _described(raw: dict[str, Any], whole: Any, hf: Any, where: str) -> DecoderConfig:
    problems: list[Problem] = []
    sizes = {}
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        value = getattr(hf, key, None)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            problems.append(Problem(f"{key} must be a positive integer, found {value!r}", where))
            value = 0
        sizes[key] = value
    dtype = _dtype(raw)
    if dtype not in DTYPES:
        problems.append(
            Problem(
                f"dtype {dtype!r} is not supported (supported: {', '.join(DTYPES)})",
                where,
                "save the model in one of these types first",
            )
        )
    raise_all(problems)
    for config in (whole, hf):
        # Types and storage are ours to decide; everything else is transformers' business.
        config.dtype = None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return DecoderConfig(
        model_type=raw["model_type"],
        architectures=tuple(raw.get("architectures") or ()),
        **sizes,
        max_position_embeddings=_longest(raw, hf),
        dtype=dtype,
        tie_word_embeddings=bool(getattr(whole, "tie_word_embeddings", False)),
        quantization=raw.get("quantization_config"),
        raw=raw,
        whole=whole,
        hf=hf,
    )


def auto_class(config_class: type) -> Any:
    """The class of transformers that makes a language model of such a config; None if none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if config_class in auto._model_mapping:
            return auto
    return None


def _raw_problems(raw: dict[str, Any], where: str) -> Iterator[Problem]:
    """What can be told before transformers is asked to read the values."""
    from transformers import CONFIG_MAPPING

    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict | None):
        yield Problem(f"quantization_config must be an object, found {quantization!r}", where)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        yield Problem(
            f"model_type must name an architecture, found {model_type!r}",
            where,
            "download the checkpoint again, or add the model_type that its authors name",
        )
    elif model_type in CONFIG_MAPPING:
        if raw.get("is_encoder_decoder"):
            yield Problem(f"{model_type} is an encoder-decoder model, not a decoder", where)
        elif auto_class(CONFIG_MAPPING[model_type]) is None:
            yield Problem(
                f"model_type {model_type!r} is no language model that transformers can run",
                where,
                "give a decoder-only language model",
            )
    elif raw.get("auto_map"):
        yield Problem(
            f"model_type {model_type!r} comes with code of its own, which would have to be "
            "trusted, and mlcawq runs no code from a checkpoint",
            where,
            "use a checkpoint of this model that has been converted for transformers, or a "
            "transformers release that knows it",
        )
    else:
        yield Problem(
            f"model_type {model_type!r} is not supported: the installed transformers does not "
            "know it",
            where,
            "install a transformers release that does",
        )


def _dtype(raw: dict[str, Any]) -> str:
    text = raw.get("text_config")
    for given in (raw, text if isinstance(text, dict) else {}):
        if value := given.get("dtype") or given.get("torch_dtype"):
            return str(value).removeprefix("torch.")
    return "float32"


def _longest(raw: dict[str, Any], hf: Any) -> int:
    for key in _LENGTHS:
        # What a class leaves out of its fields (Bloom's seq_length) is still in the file.
        for value in (getattr(hf, key, None), raw.get(key)):
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return UNLIMITED


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on rope keys and the like: what matters is an error here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
