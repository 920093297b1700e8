"""mlc-chat-config.json: keys that mlc_llm reads, and a round trip to the architecture."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from published_templates.llama import LLAMA_2
from tiny_models import ROPES, make_tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mlcawq.build.chat_config import quantization_of, read_chat_config
from mlcawq.build.gen_config import gen_config
from mlcawq.build.tokenizer_files import tokenizer_info
from mlcawq.checkpoint.config import AwqConfig, parse_config, read_config
from mlcawq.errors import UserError

# The fields that mlc_llm's MLCChatConfig requires or fills, and those of its config classes.
MLC_KEYS = {
    "version",
    "model_type",
    "quantization",
    "model_config",
    "vocab_size",
    "context_window_size",
    "sliding_window_size",
    "prefill_chunk_size",
    "attention_sink_size",
    "tensor_parallel_shards",
    "pipeline_parallel_stages",
    "active_vocab_size",
    "temperature",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_p",
    "tokenizer_files",
    "tokenizer_info",
    "conv_template",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "model_task",
}
MLC_MODEL_KEYS = {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "head_dim",
    "context_window_size",
    "prefill_chunk_size",
    "tensor_parallel_shards",
    "max_batch_size",
}
MLC_FAMILY_KEYS = {
    "llama": {"position_embedding_base", "rope_scaling", "tie_word_embeddings"},
    "mistral": {"position_embedding_base", "sliding_window_size", "attention_sink_size"},
    "qwen2": {"rope_theta", "hidden_act", "tie_word_embeddings", "dtype"},
    "qwen3": {"rope_theta", "hidden_act", "attention_bias", "tie_word_embeddings", "dtype"},
}


def folder(path: Path, family: str = "llama", **settings: Any) -> Path:
    """A checkpoint without weights: gen_config reads none."""
    made = make_tiny_model(path, family, layers=1, **settings)
    for file in made.glob("*.safetensors"):
        file.unlink()
    return made


def sizes(context: int, chunk: int | None = None, batch: int | None = None) -> dict[str, Any]:
    return {
        "context_window_size": context,
        "prefill_chunk_size": chunk,
        "max_batch_size": batch,
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("gen") / "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.mark.parametrize("config_form", [4, 5])
@pytest.mark.parametrize("family", MLC_FAMILY_KEYS)
def test_the_architecture_survives(
    tmp_path: Path, out: Path, family: str, config_form: int
) -> None:
    checkpoint = folder(tmp_path / "hf", family, config_form=config_form, rope="llama3", tie=True)
    generated = gen_config(checkpoint, out).config
    assert generated == json.loads((out / "mlc-chat-config.json").read_text())
    assert set(generated) >= MLC_KEYS
    assert set(generated["model_config"]) >= MLC_MODEL_KEYS | MLC_FAMILY_KEYS[family]
    # mlc_llm's qwen3 refuses a quantization_config that is not fp8.
    assert "quantization_config" not in generated["model_config"]
    original, read = read_config(checkpoint), read_chat_config(out).model
    ignored = {"raw": {}, "dtype": "float32"}
    assert dataclasses.replace(read, **ignored) == dataclasses.replace(original, **ignored)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_survives(tmp_path: Path, out: Path, rope: str) -> None:
    checkpoint = folder(tmp_path / "hf", rope=rope)
    gen_config(checkpoint, out)
    assert read_chat_config(out).model.rope == read_config(checkpoint).rope


def test_the_conversation_is_found_and_the_tokens_are_the_models(llama: Path, out: Path) -> None:
    generated = gen_config(llama, out)
    assert generated.config["conv_template"]["name"] == "chatml"
    ids = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    end = next(token["id"] for token in ids if token["content"] == "<|im_end|>")
    assert end in generated.config["conv_template"]["stop_token_ids"]
    assert generated.config["eos_token_id"] == end
    assert generated.messages == ("conversation template: chatml",)


def test_sampling_defaults_come_from_generation_config(llama: Path, tmp_path: Path, out: Path):
    checkpoint = Path(shutil.copytree(llama, tmp_path / "hf"))
    (checkpoint / "generation_config.json").write_text(
        json.dumps(
            {
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
                "min_p": None,
                "eos_token_id": [2, 0],
                "pad_token_id": None,
            }
        )
    )
    config = gen_config(checkpoint, out).config
    assert config["top_k"] == 20
    assert "min_p" not in config
    assert (config["temperature"], config["top_p"], config["eos_token_id"]) == (0.6, 0.9, [2, 0])
    assert config["repetition_penalty"] == 1.0
    assert config["conv_template"]["stop_token_ids"][:2] == [2, 0]


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({}, 1.0),
    ],
)
def test_a_model_published_as_greedy_stays_greedy(
    llama: Path, tmp_path: Path, out: Path, given: dict, temperature: float
) -> None:
    checkpoint = Path(shutil.copytree(llama, tmp_path / "hf"))
    (checkpoint / "generation_config.json").write_text(json.dumps(given))
    assert gen_config(checkpoint, out).config["temperature"] == temperature


def test_sizes_are_chosen_and_checked(llama: Path, out: Path) -> None:
    config = gen_config(llama, out).config
    assert (config["context_window_size"], config["prefill_chunk_size"]) == (1024, 1024)
    config = gen_config(llama, out, **sizes(512, 4096, 2)).config
    assert (config["context_window_size"], config["prefill_chunk_size"]) == (512, 512)
    assert config["max_batch_size"] == config["model_config"]["max_batch_size"] == 2
    with pytest.raises(UserError) as error:
        gen_config(llama, out, **sizes(0, -1, 0))
    assert len(error.value.problems) == 3


def test_a_context_beyond_the_model_is_warned_of(llama: Path, out: Path) -> None:
    messages = gen_config(llama, out, **sizes(4096, 512, 1)).messages
    assert [m for m in messages if "longer than the 1024 that the model was made for" in m]
    assert not any("longer" in m for m in gen_config(llama, out, **sizes(1024, 512, 1)).messages)


def test_a_sliding_window_limits_the_context(tmp_path: Path, out: Path) -> None:
    checkpoint = folder(tmp_path / "hf", "mistral", sliding_window=256)
    generated = gen_config(checkpoint, out)
    assert generated.config["context_window_size"] == 256
    assert generated.config["sliding_window_size"] == -1
    assert any("sliding window" in message for message in generated.messages)
    with pytest.raises(UserError, match="256 tokens"):
        gen_config(checkpoint, out, **sizes(1024))


def test_quantization_names_say_the_group_size() -> None:
    awq = AwqConfig(4, 64, False, "gemm", ("lm_head",))
    assert quantization_of("q4f16_autoawq_g64", dataclasses.asdict(awq)) == awq
    assert quantization_of("q4f16_autoawq") == AwqConfig(4, 128, True, "gemm")
    assert quantization_of("q0f16") is None
    with pytest.raises(UserError, match="q4f16_1"):
        quantization_of("q4f16_1")


def test_an_awq_checkpoint_records_its_layout(llama: Path, tmp_path: Path, out: Path) -> None:
    checkpoint = Path(shutil.copytree(llama, tmp_path / "awq"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    generated = gen_config(checkpoint, out).config
    assert generated["quantization"] == "q4f16_autoawq_g64"
    assert generated["weight_layout"] == "autoawq"
    assert read_chat_config(out).model.quantization == read_config(checkpoint).quantization


def test_a_stock_mlc_file_is_read(out: Path) -> None:
    """Keys as mlc_llm writes them for llama: no config.json keys, no layout."""
    stock = {
        "version": "0.1.0",
        "model_type": "llama",
        "quantization": "q4f16_autoawq",
        "model_config": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-05,
            "vocab_size": 400,
            "tie_word_embeddings": False,
            "position_embedding_base": 500000,
            "rope_scaling": None,
            "context_window_size": 2048,
            "prefill_chunk_size": 1024,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "tensor_parallel_shards": 1,
            "pipeline_parallel_stages": 1,
            "max_batch_size": 80,
            "disaggregation": False,
        },
        "vocab_size": 400,
        "context_window_size": 2048,
        "sliding_window_size": -1,
        "prefill_chunk_size": 1024,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
    }
    path = out / "mlc-chat-config.json"
    path.write_text(json.dumps(stock))
    config = read_chat_config(path)
    assert config.model.rope.theta == 500000
    assert config.weight_layout == "autoawq"
    assert config.sizes.max_batch_size == 80
    assert config.model.quantization == AwqConfig(4, 128, True, "gemm")
    stock.update(quantization="q4f16_1", context_window_size=-1, tensor_parallel_shards=2)
    path.write_text(json.dumps(stock))
    with pytest.raises(UserError) as error:
        read_chat_config(out)
    assert len(error.value.problems) == 3


def test_a_tokenizer_beyond_the_vocabulary_is_refused(llama: Path, tmp_path: Path, out: Path):
    checkpoint = Path(shutil.copytree(llama, tmp_path / "hf"))
    config = json.loads((checkpoint / "config.json").read_text())
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    for size in (2, max(vocabulary.values())):
        config["vocab_size"] = size
        (checkpoint / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"beyond the model's vocabulary of {size}"):
            gen_config(checkpoint, out)


def test_a_missing_or_broken_tokenizer_is_refused(llama: Path, tmp_path: Path, out: Path) -> None:
    checkpoint = Path(shutil.copytree(llama, tmp_path / "hf"))
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0])
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="listed twice"):
        gen_config(checkpoint, out)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        gen_config(checkpoint, out)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        gen_config(checkpoint, out)


def test_a_slow_tokenizer_is_converted(tmp_path: Path, out: Path) -> None:
    """vocab.json and merges.txt alone, as older GPT-2 style releases come."""
    checkpoint = folder(tmp_path / "hf", "qwen2")
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    model = content["model"]
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (checkpoint / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer_config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    tokenizer_config["tokenizer_class"] = "Qwen2Tokenizer"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (checkpoint / "tokenizer.json").unlink()
    config = gen_config(checkpoint, out).config
    assert "tokenizer.json" in config["tokenizer_files"]
    text = "The quick brown fox"
    made = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert made.decode(made.encode(text).ids) == text


def test_tokenizer_info(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel()
    byte_level.decoder = decoders.ByteLevel()
    byte_level.save(str(path))
    assert tokenizer_info(path) == {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": False,
    }
    sentencepiece = Tokenizer(models.BPE(byte_fallback=True))
    sentencepiece.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    sentencepiece.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    sentencepiece.save(str(path))
    assert tokenizer_info(path) == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }


def test_parse_config_is_not_confused_by_mlc_keys(llama: Path, out: Path) -> None:
    """model_config holds both vocabularies; ours must win where they mean the same."""
    generated = gen_config(llama, out).config
    parsed = parse_config(generated["model_config"])
    assert parsed.max_position_embeddings == 1024
    assert parsed.hidden_size == 128


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_sentencepiece_like_prompt_has_hugging_faces_tokens(
    tmp_path: Path, out: Path, scheme: str
) -> None:
    """Llama 2's template with its bos and spaces, compared by token ids, not by text alone."""
    checkpoint = folder(tmp_path / "hf", vocab_size=600)
    for name in ("chat_template.jinja", "tokenizer.json"):
        (checkpoint / name).unlink()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA_2}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["[INST] Hello there [/INST] one two three"] * 4, trainer)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    generated = gen_config(checkpoint, out)
    assert generated.config["conv_template"]["name"] == "llama-2"
    assert generated.config["conv_template"]["system_prefix_token_ids"] == [1]
    assert generated.config["eos_token_id"] == 2
    assert not any("differs from Hugging Face" in message for message in generated.messages)
