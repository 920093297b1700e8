"""Streaming text against tokenizers' own decode of the whole, on random text and random bytes."""

import random

import pytest
from tokenizers import Tokenizer
from tokenizers_for_tests import byte_level, sentencepiece_like

from mlcawq.engine.detokenizer import StopStrings, is_byte_level, make_detokenizer

ALPHABET = "abc de\n.  éß中界🙂👩‍🚀\u0301\ufffd\u2028Ω"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": Tokenizer.from_file(str(byte_level(folder / "a.json"))),
        "metaspace": Tokenizer.from_file(str(sentencepiece_like(folder / "b.json"))),
        "legacy": Tokenizer.from_file(str(sentencepiece_like(folder / "c.json", "legacy"))),
    }


def stream(tokenizer, ids, special=(), context=()):
    detokenizer = make_detokenizer(tokenizer, special, context)
    pieces = [detokenizer.push(i) for i in ids]
    return pieces, detokenizer.flush()


def test_kinds(tokenizers):
    assert is_byte_level(tokenizers["byte_level"])
    assert not is_byte_level(tokenizers["metaspace"])


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "legacy"])
def test_random_text_streams_to_the_same_text(tokenizers, kind):
    tokenizer, rng = tokenizers[kind], random.Random(kind)
    for _ in range(300):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 30)))
        ids = tokenizer.encode(text).ids
        pieces, rest = stream(tokenizer, ids)
        # Half a character never shows: a replacement character only where the text has one.
        assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")
        assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_random_bytes_stream_as_the_whole_decodes(tokenizers):
    tokenizer, rng = tokenizers["byte_level"], random.Random(0)
    for _ in range(500):
        ids = rng.choices(range(3, 368), k=rng.randrange(1, 40))
        pieces, rest = stream(tokenizer, [*ids, tokenizer.encode(".").ids[0]])
        assert rest == ""
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False) + "."


def test_characters_come_out_as_soon_as_they_are_complete(tokenizers):
    for kind in ("byte_level", "metaspace"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("a界b").ids
        pieces, _ = stream(tokenizer, ids)
        a, b = next(i for i, p in enumerate(pieces) if "界" in p), len(pieces) - 1
        assert pieces[a] == "界"
        assert a == b - 1


def test_a_cut_off_character_is_dropped(tokenizers):
    for kind in ("byte_level", "metaspace"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("ab🙂").ids[:-1]
        pieces, rest = stream(tokenizer, ids)
        assert "".join(pieces) + rest == "ab"


def test_special_tokens_do_not_show(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("a<|im_end|>b<think>c").ids
    pieces, _ = stream(tokenizer, ids, special={0, 1, 2})
    assert "".join(pieces) == "ab<think>c"


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
def test_the_leading_space_depends_on_the_context(tokenizers, kind):
    tokenizer = tokenizers[kind]
    answer = tokenizer.encode("two two").ids
    assert "".join(stream(tokenizer, answer)[0]) == "two two"
    prompt = tokenizer.encode("The capital").ids
    assert "".join(stream(tokenizer, answer, context=prompt)[0]) == " two two"


def test_stop_strings_against_a_plain_search():
    rng = random.Random(1)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        text = "".join(rng.choices("abc", k=12))
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        expected = text[: min(ends)[1]] if ends else text
        guard, shown, stopped, i = StopStrings(stops), "", False, 0
        while i < len(text) and not stopped:
            n = rng.randrange(1, 4)
            fresh, stopped = guard.push(text[i : i + n])
            shown, i = shown + fresh, i + n
            assert expected.startswith(shown)
        if not stopped:
            shown += guard.flush()
        assert shown == expected
        assert stopped == bool(ends)


def test_only_the_undecided_end_is_held_back():
    guard = StopStrings(["\n\nUser:"])
    assert guard.push("Yes.\n") == ("Yes.", False)
    assert guard.push("\nUs") == ("", False)
    assert guard.push("e it") == ("\n\nUse it", False)
    assert guard.push("\n\nUser: hi") == ("", True)
