"""config.json, read strictly into typed objects.

Two generations of the file are in use: transformers 4 wrote `torch_dtype`, `rope_theta` and
`rope_scaling`; transformers 5 writes `dtype` and `rope_parameters`. Both are read. A value that
changes what the model computes and that is not understood is an error, never a default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlcawq.errors import Problem, UserError, raise_all

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
DTYPES = ("float16", "bfloat16", "float32")
# What to do about a storage format that is read, but not by a build.
REPACK = "store it as AutoAWQ's gemm version: mlcawq repack THIS_FOLDER -o OUT --format awq"

# What a key is when config.json leaves it out, by model_type: transformers' own defaults, which
# it does not write in every release.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how its frequencies are scaled.

    rope_type: one of ROPE_TYPES, transformers' names.
    theta: the base of the frequencies.
    params: the type's other keys as transformers names them (factor, low_freq_factor, …).
    """

    rope_type: str
    theta: float
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AwqConfig:
    """`quantization_config` of an AWQ checkpoint, in AutoAWQ's terms."""

    bits: int
    group_size: int
    zero_point: bool
    version: str
    modules_to_not_convert: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder-only checkpoint computes. Sizes are in elements.

    dtype: the type of its unquantized tensors, one of DTYPES.
    sliding_window: attention span in tokens where some layer is windowed, else None.
    layer_types: "full_attention" or "sliding_attention" for every layer.
    raw: config.json as it was read.
    """

    model_type: str
    architectures: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    sliding_window: int | None
    layer_types: tuple[str, ...]
    dtype: str
    quantization: AwqConfig | None
    raw: dict[str, Any]


def computed_settings(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes, as JSON gives them back.

    A compiled library records them, so that it is never run for a config with others.
    """
    apart = ("architectures", "max_position_embeddings", "dtype", "quantization", "raw")
    values = {key: value for key, value in asdict(config).items() if key not in apart}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises UserError when it is missing, broken or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError.one("no such file", str(path)) from None
    except OSError as error:
        raise UserError.one(f"cannot be read: {error.strerror}", str(path)) from None
    except (ValueError, RecursionError) as error:
        raise UserError.one(f"not valid JSON: {error}", str(path), "download it again") from None
    if not isinstance(content, dict):
        raise UserError.one("a JSON object was expected", str(path))
    return content


def read_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder. Raises UserError naming everything that is wrong."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError.one(
            "no config.json: this is not a Hugging Face checkpoint",
            str(folder),
            "give the folder that holds config.json and *.safetensors, or a hub name",
        )
    return parse_config(load_json(path), where=str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """As `read_config`, from the parsed JSON. `where` opens each message."""
    from mlcawq.families import family_of

    family = family_of(raw.get("model_type"), where)
    read = _Reader({**_DEFAULTS[family.model_type], **raw}, where)

    heads = read.integer("num_attention_heads")
    hidden_size = read.integer("hidden_size")
    # A missing num_attention_heads is one problem, not three: hence the harmless fallbacks.
    kv_heads = read.integer("num_key_value_heads", heads or 1)
    head_dim = read.integer("head_dim", hidden_size // heads if heads and hidden_size else 2)
    layers = read.integer("num_hidden_layers")
    if heads and kv_heads and heads % kv_heads:
        read.problem(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        read.problem(f"head_dim {head_dim} is odd; rotary embedding needs pairs")
    hidden_act = read.choice("hidden_act", ("silu",), "silu")
    context = read.integer("max_position_embeddings")
    window, layer_types = _attention_span(read, family.sliding_window, layers)

    config = ModelConfig(
        model_type=family.model_type,
        architectures=tuple(raw.get("architectures") or family.architectures),
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=read.integer("vocab_size"),
        max_position_embeddings=context,
        rms_norm_eps=read.number("rms_norm_eps"),
        hidden_act=hidden_act,
        tie_word_embeddings=read.boolean("tie_word_embeddings", False),
        attention_bias=family.biased("qkv", raw),
        o_bias=family.biased("o", raw),
        mlp_bias=family.biased("mlp", raw),
        qk_norm=family.qk_norm,
        rope=_rope(read, context),
        sliding_window=window,
        layer_types=layer_types,
        dtype=_dtype(read),
        quantization=_quantization(read),
        raw=raw,
    )
    raise_all(read.problems)
    return config


def read_quantization(raw: dict[str, Any], where: str = "config.json") -> AwqConfig | None:
    """The AWQ settings of a config whose family need not be known; None where it has none.

    Raises UserError for other quantizations, and for AWQ in a form that is not supported.
    """
    read = _Reader(raw, where)
    found = _quantization(read)
    raise_all(read.problems)
    return found


class _Reader:
    """Typed look-ups in a JSON object that collect what is wrong instead of stopping."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.problems: list[Problem] = []

    def problem(self, what: str, fix: str = "") -> None:
        self.problems.append(Problem(what, self.where, fix))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.problem(f"{key} must be a positive integer, found {value!r}")
            return 0
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            self.problem(f"{key} must be a positive number, found {value!r}")
            return 0.0
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(f"{key} must be true or false, found {value!r}")
        return bool(value)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.raw.get(key) or default
        if value not in allowed:
            self.problem(f"{key} {value!r} is not supported (supported: {', '.join(allowed)})")
        return str(value)


def _rope(read: _Reader, context: int) -> RopeConfig:
    raw = read.raw
    # transformers 5 nests theta; transformers 4 keeps it beside `rope_scaling`.
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        read.problem("rope parameters that differ from layer to layer are not supported")
        return RopeConfig("default", 10000.0)
    params = dict(given)
    rope_type = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    rotary = params.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if rotary != 1.0:
        read.problem(f"partial_rotary_factor {rotary} is not supported for this family")
    if rope_type not in ROPE_TYPES:
        read.problem(f"rope type {rope_type!r} is not supported (known: {', '.join(ROPE_TYPES)})")
    if not isinstance(theta, (int, float)) or theta <= 0:
        read.problem(f"rope_theta must be a positive number, found {theta!r}")
        theta = 10000.0
    # Config-level value wins, as in transformers (Phi-3 keeps it there).
    original = raw.get("original_max_position_embeddings")
    if original and rope_type in ("yarn", "longrope", "llama3"):
        params["original_max_position_embeddings"] = original
    needs = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(rope_type, ())
    for key in needs:
        if params.get(key) is None:
            read.problem(f"rope type {rope_type!r} needs {key}")
    if rope_type in ("yarn", "longrope", "llama3"):
        params.setdefault("original_max_position_embeddings", context)
    return RopeConfig(rope_type, float(theta), params)


def _attention_span(read: _Reader, rule: str, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Which layers attend to everything and which to a window, by the family's rule."""
    raw = read.raw
    window = raw.get("sliding_window")
    if rule == "never" or (rule == "opt-in" and not raw.get("use_sliding_window", False)):
        window = None
    if window is not None and (not isinstance(window, int) or window <= 0):
        read.problem(f"sliding_window must be a positive integer or null, found {window!r}")
        window = None
    if window is None:
        return None, ("full_attention",) * layers
    types = raw.get("layer_types")
    if types is None or rule == "always":
        first = raw.get("max_window_layers", 28) if rule == "opt-in" else 0
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        read.problem(f"layer_types {', '.join(unknown)} are not supported")
    if len(types) != layers:
        read.problem(f"layer_types has {len(types)} entries for {layers} layers")
    return (window if "sliding_attention" in types else None), tuple(types)


def _dtype(read: _Reader) -> str:
    value = read.raw.get("dtype") or read.raw.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        read.problem(
            f"dtype {name!r} is not supported (supported: {', '.join(DTYPES)})",
            "save the model in one of these types first",
        )
    return name


def _quantization(read: _Reader) -> AwqConfig | None:
    given = read.raw.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        read.problem(f"quantization_config must be an object, found {given!r}")
        return None
    method = given.get("quant_method")
    if method != "awq":
        read.problem(
            f"the checkpoint is already quantized with {method!r}",
            REPACK
            if method == "compressed-tensors"
            else "start from the unquantized checkpoint, or from an AWQ one",
        )
        return None
    # llm-awq wrote w_bit and q_group_size; AutoAWQ writes bits and group_size.
    bits = given.get("bits", given.get("w_bit"))
    group_size = given.get("group_size", given.get("q_group_size"))
    version = str(given.get("version") or "gemm").lower()
    if given.get("backend") == "llm-awq":  # whatever version is beside it
        version = "llm-awq"
    if bits != 4:
        read.problem(f"AWQ with {bits!r} bits is not supported (supported: 4)")
    if group_size not in (32, 64, 128):
        read.problem(f"AWQ group size {group_size!r} is not supported (supported: 32, 64, 128)")
    if version != "gemm":
        read.problem(f"AWQ storage version {version!r} is not supported (supported: gemm)", REPACK)
    return AwqConfig(
        bits=bits if isinstance(bits, int) else 0,
        group_size=group_size if isinstance(group_size, int) else 0,
        zero_point=bool(given.get("zero_point", True)),
        version=version,
        modules_to_not_convert=tuple(given.get("modules_to_not_convert") or ()),
    )
