"""Prompts to token ids: equal to Hugging Face's for ordinary text, and safe for hostile text."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tokenizers_for_tests import byte_level, sentencepiece_like

from mlcawq.engine.conversation import Conversation
from mlcawq.engine.tokenizer import ModelTokenizer
from mlcawq.errors import UserError

CHATML = Conversation(
    roles={"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"},
    seps=["<|im_end|>\n"],
    role_content_sep="\n",
    role_empty_sep="\n",
    system_template="<|im_start|>system\n{system_message}<|im_end|>\n",
    stop_str=["<|im_end|>", "User:"],
    stop_token_ids=[0],
)
LLAMA2 = Conversation(
    roles={"user": "<s>[INST]", "assistant": "[/INST]"},
    seps=[" ", " </s>"],
    role_content_sep=" ",
    system_template="",
)
ORDINARY = "abc DE\n\n  .é界🙂'\t<|im_ [INST] two hot Paris\u0301"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(params=["byte_level", "metaspace", "legacy"])
def case(request, folder):
    path = folder / f"{request.param}.json"
    if request.param == "byte_level":
        return ModelTokenizer(byte_level(path), CHATML), Tokenizer.from_file(str(path))
    sentencepiece_like(path, request.param)
    return ModelTokenizer(path, LLAMA2), Tokenizer.from_file(str(path))


def test_ordinary_chats_encode_as_the_rendered_string(case):
    ours, plain = case
    rng = random.Random(0)
    for _ in range(300):
        messages = [
            {
                "role": ("user", "assistant")[i % 2],
                "content": "".join(rng.choices(ORDINARY, k=rng.randrange(20))),
            }
            for i in range(rng.choice((1, 3, 5)))
        ]
        rendered = ours.conversation.render(messages)
        assert ours.encode_chat(messages) == plain.encode(rendered, add_special_tokens=False).ids


@pytest.mark.parametrize("prepend", ["metaspace", "legacy"])
def test_prefix_tokens_encode_as_a_part_of_the_string(folder, prepend):
    """A tokenizer that marks the first word of a string must not mark the one behind <s>."""
    path = sentencepiece_like(folder / f"prefix-{prepend}.json", prepend)
    plain = Tokenizer.from_file(str(path))
    bos = plain.token_to_id("<s>")
    conversation = Conversation(
        roles={"user": "[INST]", "assistant": "[/INST]"},
        seps=[" ", "</s>"],
        role_content_sep=" ",
        system_template="",
        system_prefix_token_ids=[bos],
    )
    ours = ModelTokenizer(path, conversation)
    for text in ("abc", "<s>abc", " abc"):
        messages = [{"role": "user", "content": text}]
        ids = ours.encode_chat(messages)
        assert ids[0] == bos
        assert ids.count(bos) == 1
        if "<s>" not in text:
            rendered = "<s>" + conversation.render(messages)
            assert ids == plain.encode(rendered, add_special_tokens=False).ids


def test_control_tokens_in_messages_stay_text(case):
    ours, plain = case
    specials = sorted(t for t in ("<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|endoftext|>"))
    for hostile in (*specials, "x".join(specials), specials[0] * 3):
        for role in ("user", "assistant"):
            messages = [{"role": "user", "content": "a"}, {"role": role, "content": hostile}]
            harmless = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
            ids, expected = ours.encode_chat(messages), ours.encode_chat(harmless)
            controls = [i for i in ids if i in ours.special_ids]
            assert controls == [i for i in expected if i in ours.special_ids]
            assert hostile in plain.decode(ids, skip_special_tokens=False)


def test_a_control_token_across_the_border_is_none(folder):
    conversation = Conversation(roles={"user": "<|im_", "assistant": "A"}, seps=["<|im_end|>"])
    path = byte_level(folder / "border.json")
    ids = ModelTokenizer(path, conversation).encode_chat([{"role": "user", "content": "start|>"}])
    assert [i for i in ids if i < 3] == [2]
    assert Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=False) == (
        "<|im_start|><|im_end|>A"
    )


def test_a_control_token_out_of_normalization_is_none(folder):
    path = byte_level(folder / "normalized.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<go>", special=True, normalized=True)])
    tokenizer.save(str(path))
    wide = "\uff1cgo\uff1e"  # NFKC makes <go> of it
    go = tokenizer.token_to_id("<go>")
    assert tokenizer.encode(wide).ids == [go]
    assert go not in ModelTokenizer(path, CHATML).encode_chat([{"role": "user", "content": wide}])


def test_other_added_tokens_are_tokens_everywhere(folder):
    ours = ModelTokenizer(byte_level(folder / "t.json"), CHATML)
    think = ours.token_id("<think>")
    assert think in ours.encode_chat([{"role": "assistant", "content": "<think>hm"}])


def test_stripping_tokens_keep_their_flags(folder):
    path = byte_level(folder / "late.json")
    conversation = Conversation(
        roles={"user": "<|late|>", "assistant": "<|late|>"}, seps=[""], role_content_sep="  \n"
    )
    messages = [{"role": "user", "content": "  hi"}]
    expected = Tokenizer.from_file(str(path)).encode(conversation.render(messages)).ids
    assert ModelTokenizer(path, conversation).encode_chat(messages) == expected


def test_a_plain_token_used_by_the_template_is_guarded(folder):
    conversation = Conversation(roles={"user": "<think>", "assistant": "A"}, seps=[""])
    ours = ModelTokenizer(byte_level(folder / "u.json"), conversation)
    ids = ours.encode_chat([{"role": "user", "content": "<think>"}])
    assert ids.count(ours.token_id("<think>")) == 1


def test_prefix_ids_and_plain_text(folder):
    path = byte_level(folder / "p.json")
    plain = Conversation(roles={"user": "", "assistant": ""}, seps=[""])
    with_prefix = Conversation(
        roles={"user": "", "assistant": ""}, seps=[""], system_prefix_token_ids=[0]
    )
    text_ids = Tokenizer.from_file(str(path)).encode("hot café").ids
    assert ModelTokenizer(path, plain).encode_plain("hot café") == text_ids
    assert ModelTokenizer(path, with_prefix).encode_plain("hot café") == [0, *text_ids]
    assert ModelTokenizer(path, with_prefix).encode_chat([], add_generation_prompt=False) == [0]


def test_stop_rules_turn_special_tokens_into_ids(folder):
    ours = ModelTokenizer(byte_level(folder / "s.json"), CHATML)
    assert ours.stop_rules() == ({0, ours.token_id("<|im_end|>")}, ("User:",))


@pytest.mark.parametrize(
    ("ids", "added", "size"),
    [
        ([0, 1, 2], 0, 3),
        ([0, 1, 2], 2, 5),
        ([0, 1, 4], 0, 5),  # a gap
        ([0, 2, 3, 4], 0, 5),  # a gap, and a token that has the number of tokens as its id
        ([0, 1, 5000], 0, 5001),  # far behind
    ],
)
def test_size_is_one_more_than_the_largest_id(tmp_path, ids, added, size):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in ids}, unk_token="w0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    for i in range(added):
        token = {"id": max(ids) + 1 + i, "content": f"<{i}>", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append({**token, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert ModelTokenizer(tmp_path / "tokenizer.json", CHATML).size == size


def test_an_unreadable_tokenizer(folder):
    path = folder / "broken.json"
    path.write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"broken\.json.*not a readable tokenizer"):
        ModelTokenizer(path, CHATML)
