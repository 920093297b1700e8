"""Build, step 1: mlc-chat-config.json and the tokenizer files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from mlcawq.build.chat_config import (
    ATTENTION_SINK_SIZE,
    CONFIG_NAME,
    CONFIG_VERSION,
    awq_keys,
    mlc_model_config,
)
from mlcawq.build.chat_template import ChatTemplate, RenderRefusedError, find_chat_template
from mlcawq.build.conversation_match import PROBES, TemplateChoice, choose
from mlcawq.build.generation_settings import generation_settings
from mlcawq.build.model_tokens import ModelTokens, load_tokenizer
from mlcawq.build.tokenizer_files import copy_tokenizer, tokenizer_info
from mlcawq.checkpoint.config import ModelConfig, read_config
from mlcawq.checkpoint.writing import write_json
from mlcawq.engine.conversation import Conversation
from mlcawq.engine.tokenizer import ModelTokenizer
from mlcawq.errors import UserError
from mlcawq.graph.roundings import EXACT, Roundings
from mlcawq.graph.settings import (
    CompileSettings,
    compile_settings,
    infer_quantization,
)
from mlcawq.graph.tables import PLAIN, Tables


@dataclass(frozen=True)
class GeneratedConfig:
    """config: mlc-chat-config.json as written; messages: lines for the user."""

    config: dict[str, Any]
    template: TemplateChoice
    messages: tuple[str, ...]


def gen_config(
    checkpoint: Path,
    out: Path,
    quantization: str | None = None,
    conv_template: str | None = None,
    *,
    weight_layout: str | None = None,
    tables: Tables = PLAIN,
    roundings: Roundings = EXACT,
    context_window_size: int | None = None,
    prefill_chunk_size: int | None = None,
    max_batch_size: int | None = None,
) -> GeneratedConfig:
    """Write mlc-chat-config.json and the tokenizer of `checkpoint` into the folder `out`.

    quantization: MLC's name, None for what the checkpoint is. weight_layout: of quantized weights
    (`tir_kernels.layouts`), None for the stock one. tables: how head and embedding will be stored.
    roundings: what the library will round beside them. conv_template: a shipped template's name or
    a JSON file, None to find it from the model's chat template. The sizes (tokens, tokens,
    sequences) are what the library is compiled for; see `compile_settings` for their defaults.
    Raises UserError for everything that is wrong with the checkpoint or with the arguments.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = read_config(checkpoint)
    kind = infer_quantization(config, quantization, weight_layout, tables)
    kind = replace(kind, roundings=roundings)
    sizes = compile_settings(config, context_window_size, prefill_chunk_size, max_batch_size)
    files = copy_tokenizer(checkpoint, out)
    tokens = ModelTokens.read(out, checkpoint)
    _check_vocabulary(config, out)
    template = find_chat_template(checkpoint)
    choice = choose(template, tokens, conv_template)
    messages = [*choice.report(), *_window_note(config, sizes)]
    if template is not None and not choice.differences:
        messages += _token_differences(choice.conversation, template, out / "tokenizer.json")

    content: dict[str, Any] = {
        "version": CONFIG_VERSION,
        "model_type": config.model_type,
        "quantization": kind.name,
        "model_config": mlc_model_config(config, sizes),
        "vocab_size": config.vocab_size,
        "context_window_size": sizes.context_window_size,
        "sliding_window_size": -1,
        "prefill_chunk_size": sizes.prefill_chunk_size,
        "attention_sink_size": ATTENTION_SINK_SIZE if config.model_type == "mistral" else -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": min(tokens.vocab_size, config.vocab_size),
        **generation_settings(checkpoint),
        "tokenizer_files": files,
        "tokenizer_info": tokenizer_info(out / "tokenizer.json"),
        "conv_template": choice.conversation.to_dict(),
        "model_task": "chat",
        "embedding_metadata": None,
        "max_batch_size": sizes.max_batch_size,
    }
    if config.quantization is not None:
        content |= awq_keys(config.quantization, kind.weight_layout)
    content |= kind.names()
    write_json(out / CONFIG_NAME, content)
    return GeneratedConfig(content, choice, tuple(messages))


def _check_vocabulary(config: ModelConfig, out: Path) -> None:
    vocabulary = load_tokenizer(out / "tokenizer.json").get_vocab(with_added_tokens=True)
    beyond = {text: i for text, i in vocabulary.items() if i >= config.vocab_size}
    if beyond:
        first = sorted(beyond.items(), key=lambda entry: entry[1])[:5]
        named = ", ".join(f"{text} ({i})" for text, i in first)
        raise UserError.one(
            f"the tokenizer has {len(beyond)} tokens beyond the model's vocabulary of "
            f"{config.vocab_size}: {named}",
            str(out / "tokenizer.json"),
            "use the tokenizer that belongs to this checkpoint",
        )


def _window_note(config: ModelConfig, sizes: CompileSettings) -> list[str]:
    made_for = config.max_position_embeddings
    if sizes.context_window_size > made_for:
        return [
            f"warning: the context window of {sizes.context_window_size} tokens is longer than the "
            f"{made_for} that the model was made for; expect nonsense beyond them"
        ]
    window = config.sliding_window
    if window is None or sizes.context_window_size < window:
        return []
    return [
        f"note: the model attends to a sliding window; the context is limited to its {window} "
        "tokens, where the result is the same"
    ]


def _token_differences(
    conversation: Conversation, template: ChatTemplate, tokenizer_json: Path
) -> list[str]:
    """Dialogues whose text is right and whose token ids still differ from Hugging Face's."""
    reference: tokenizers.Tokenizer = load_tokenizer(tokenizer_json)
    ours = ModelTokenizer(tokenizer_json, conversation)
    out = []
    for name, dialogue in PROBES.items():
        try:
            text = template.render(dialogue)
            got = ours.encode_chat(dialogue)
        except (RenderRefusedError, UserError):
            continue
        expected = reference.encode(text, add_special_tokens=False).ids
        # Reasoning marks inside a message are text to us and tokens to Hugging Face.
        if got != expected and not ({"<think>"} & set(text.split())):
            at = next(
                (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
                min(len(expected), len(got)),
            )
            out.append(
                f"warning: {name}: token {at} differs from Hugging Face's encoding of the same "
                f"text ({expected[at : at + 4]} there, {got[at : at + 4]} here)"
            )
    return out
