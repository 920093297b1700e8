"""A conversation's history and settings."""

import pytest

from mlcawq.engine.conversation import Conversation
from mlcawq.engine.engine import Delta, RequestStats
from mlcawq.engine.sampling import SamplingParams
from mlcawq.engine.session import ChatSession, unescape
from mlcawq.errors import UserError

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def session(engine):
    return ChatSession(engine, PARAMS)


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


def test_history_grows_by_question_and_answer(session):
    first = text_of(session.ask("One"))
    second = text_of(session.ask("Two"))
    assert session.messages() == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": second},
    ]
    assert session.totals.answers == 2
    assert session.totals.completion_tokens == 12
    assert "## Assistant\n\n" + first in session.transcript()


def test_what_was_shown_of_a_stopped_answer_stays(session):
    whole = text_of(session.ask("One"))
    session.reset()
    answer = session.ask("One")
    shown = next(answer).text + next(answer).text
    answer.close()
    assert session.turns[-1] == {"role": "assistant", "content": shown}
    assert whole.startswith(shown)
    assert not session.engine.has_work


def test_a_question_that_cannot_be_asked_leaves_no_trace(session):
    text_of(session.ask("One"))
    before = session.messages()
    with pytest.raises(UserError, match="context window"):
        text_of(session.ask("x " * 500))
    assert session.messages() == before
    assert text_of(session.ask("Two"))


def test_regenerating_replaces_the_answer(session):
    with pytest.raises(UserError, match="no answer to replace"):
        session.regenerate()
    text_of(session.ask("One"))
    session.set_option("temperature=2")
    session.set_option("seed=5")
    again = text_of(session.regenerate())
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"]
    assert session.turns[1]["content"] == again


def test_an_answer_stays_when_the_one_to_replace_it_never_begins(session, monkeypatch):
    text_of(session.ask("One"))
    before = session.messages()
    with monkeypatch.context() as patch:
        prefilling = Delta(1, "", (), None, RequestStats(prompt_tokens=9))
        patch.setattr(session.engine, "generate", lambda prompt, params: (yield prefilling))
        again = session.regenerate()
        assert next(again) is prefilling
        again.close()
    assert session.messages() == before
    assert text_of(session.regenerate())
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"]


def test_a_text_to_continue_has_no_system_message(session, monkeypatch):
    plain = Conversation(roles={"user": "", "assistant": ""}, seps=[""])
    monkeypatch.setattr(session.engine, "conversation", plain)
    with pytest.raises(UserError, match="no chat template"):
        session.set_system("Be brief.")
    assert session.system is None


class Parrot:
    """An engine that answers "ok" and notes what it was given; a token is a word."""

    context_window_size = 40
    conversation = Conversation(roles={"user": "U", "assistant": "A"}, seps=["\n"])

    def __init__(self):
        self.prompts = []

    def encode(self, messages):
        return " ".join(message["content"] for message in messages).split()

    def generate(self, messages, params):
        if len(self.encode(messages)) >= self.context_window_size:
            raise UserError.one("longer than the context window")
        self.prompts.append(messages)
        yield Delta(1, "ok", (5,), "stop", RequestStats(prompt_tokens=9, completion_tokens=1))


def test_the_oldest_turns_are_left_out_of_a_full_window():
    engine = Parrot()
    session = ChatSession(engine, SamplingParams(), system="Be brief.")
    for i in range(9):
        text_of(session.ask(f"{i} a b c"))  # 5 tokens with its answer
        given = engine.prompts[-1]
        assert given[0] == {"role": "system", "content": "Be brief."}
        assert given[1]["role"] == "user"
        assert given[-1]["content"] == f"{i} a b c"
        assert len(engine.encode(given)) + 10 <= 40
    # At the sixth question there are 2 + 5 * 5 + 4 tokens: too many beside an answer of 10, so
    # the first three pairs go, and 16 are left.
    assert [len(given) for given in engine.prompts] == [2, 4, 6, 8, 10, 6, 8, 10, 6]
    assert len(session.turns) == 18
    kept = session.left_out
    with pytest.raises(UserError, match="context window"):
        text_of(session.ask("x " * 50))
    assert (session.left_out, len(session.turns)) == (kept, 18)
    session.reset()
    assert session.left_out == 0


def test_a_system_message_starts_anew(session):
    text_of(session.ask("One"))
    session.set_system("Be brief.")
    assert session.messages() == [{"role": "system", "content": "Be brief."}]
    text_of(session.ask("One"))
    session.set_system(None)
    assert session.messages() == []


def test_settings(session):
    assert session.set_option("top-p = 0.5") == ("top_p", 0.5)
    assert session.set_option(r"stop=\n\nUser:") == ("stop", ("\n\nUser:",))
    assert session.set_option("stop=none") == ("stop", ())
    assert session.set_option("max_tokens=none") == ("max_tokens", None)
    assert session.params.top_p == 0.5
    before = session.params
    for wrong in ("top_p", "top_p=7", "top_k=1.5", "warmth=1", "temperature=none"):
        with pytest.raises(UserError):
            session.set_option(wrong)
    assert session.params == before


def test_escapes():
    assert unescape(r"a\nb\t\\n\q") == "a\nb\t\\n\\q"
