"""Hugging Face checkpoints, plain and quantized."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from mlcawq.build.chat_template import find_chat_template
from mlcawq.build.conversation_match import choose
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.build.weight_plan import plan_parameters
from mlcawq.checkpoint.config import ModelConfig, load_json, read_config
from mlcawq.checkpoint.source import require_tokenizer
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem, UserError
from mlcawq.families import FAMILIES, expected_tensors
from mlcawq.graph.settings import infer_quantization
from mlcawq.inspection.description import Description, size

_AWQ_PARTS = ("qweight", "qzeros", "scales")


def describe_checkpoint(path: Path) -> Description:
    """A folder with config.json: family, sizes, weights, tokenizer, and what is wrong with it."""
    out = Description(path, "a Hugging Face checkpoint")
    raw = out.attempt(lambda: load_json(path / "config.json"))
    if raw is None:
        return out
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method:
        out.kind = f"a Hugging Face checkpoint, quantized ({method})"
    out.facts["model_type"] = raw.get("model_type")
    out.facts["architectures"] = raw.get("architectures")
    config = None
    if raw.get("model_type") in FAMILIES:
        config = out.attempt(lambda: read_config(path))
        if config is not None:
            _add_architecture(out, config)
    else:
        from mlcawq.inspection.decoders import add_decoder

        add_decoder(out, path)
    _add_weights(out, path, config)
    _add_tokenizer(out, path)
    # Only families are built, but any decoder is quantized and evaluated.
    built = config is not None and config.quantization is not None
    step = "build" if built else "quantize" if not method else None
    if not out.problems and step is not None:
        out.next_step = f"mlcawq {step} {path} -o OUT"
    return out


def _add_architecture(out: Description, config: ModelConfig) -> None:
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value"
    rope = f"{config.rope.rope_type}, theta {config.rope.theta:g}"
    if "factor" in config.rope.params:
        rope += f", factor {config.rope.params['factor']:g}"
    parameters = sum(prod(shape) for shape in expected_tensors(config).values())
    out.facts.update(
        {
            "parameters": parameters,
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "intermediate size": config.intermediate_size,
            "heads": f"{heads}, {config.head_dim} wide",
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
            "rope": rope,
            "tied embeddings": config.tie_word_embeddings,
            "dtype": config.dtype,
        }
    )
    if config.sliding_window:
        windowed = config.layer_types.count("sliding_attention")
        out.facts["sliding window"] = f"{config.sliding_window} tokens in {windowed} layers"
    awq = config.quantization
    if awq is not None:
        kind = "asymmetric" if awq.zero_point else "symmetric"
        out.facts["quantization"] = (
            f"AWQ {awq.version}, {awq.bits} bits, groups of {awq.group_size}, {kind}"
        )
        if awq.modules_to_not_convert:
            out.facts["not quantized"] = list(awq.modules_to_not_convert)


def _add_weights(out: Description, path: Path, config: ModelConfig | None) -> None:
    pickles = [
        file.name
        for pattern in ("pytorch_model*.bin", "*.pt", "*.pth")
        for file in sorted(path.glob(pattern))
    ]
    if pickles and not any(path.glob("*.safetensors")):
        out.facts["weights"] = f"pickle files: {', '.join(pickles)}"
        out.problems.append(
            Problem(
                "pickle files can run code when read",
                pickles[0],
                "use a safetensors version of the model, or pass --trust-pickle",
            )
        )
        return
    reader = out.attempt(lambda: TensorReader(path))
    if reader is None:
        return
    infos = [reader.info(name) for name in reader.names]
    files = {info.file for info in infos}
    count = f"{len(infos)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}"
    out.facts["weights"] = f"{size(reader.total_bytes)}, {count}"
    by_kind: Counter[str] = Counter()
    for info in infos:
        part = info.name.rpartition(".")[2]
        by_kind[part if part in _AWQ_PARTS else info.dtype] += info.nbytes
    out.facts["bytes by kind"] = dict(by_kind.most_common())
    if config is not None:
        if config.quantization is not None and out.facts.get("parameters"):
            bits = reader.total_bytes * 8 / out.facts["parameters"]
            out.facts["bits a parameter"] = round(bits, 3)
        out.attempt(lambda: plan_parameters(config, infer_quantization(config), reader))


def _add_tokenizer(out: Description, path: Path) -> None:
    if out.attempt(lambda: require_tokenizer(path)) is None and not _has_tokenizer(path):
        return
    if not (path / "tokenizer.json").is_file():
        out.facts["tokenizer"] = "slow form only; build converts it"
    else:
        tokens = out.attempt(lambda: ModelTokens.read(path))
        if tokens is not None:
            out.facts["tokenizer"] = (
                f"{tokens.vocab_size} tokens, {len(tokens.added)} of them added"
            )
            ends = [text for text, i in tokens.added.items() if i in tokens.eos_ids]
            out.facts["ends of text"] = ends
            out.facts["chat template"] = _chat_template(path, tokens)
            return
    template = out.attempt(lambda: find_chat_template(path))
    out.facts["chat template"] = "none" if template is None else "present"


def _has_tokenizer(path: Path) -> bool:
    try:
        require_tokenizer(path)
    except UserError:
        return False
    return True


def _chat_template(path: Path, tokens: ModelTokens) -> Any:
    try:
        template = find_chat_template(path)
        if template is None:
            return "none: the model continues plain text"
        choice = choose(template, tokens)
    except UserError as error:
        return f"present, but unusable: {error.problems[0].what}"
    if choice.origin == "matched":
        return str(choice.conversation.name)
    if choice.differences:
        return f"of its own, {len(choice.differences)} kinds of dialogue render differently"
    return "of its own"
