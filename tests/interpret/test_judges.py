"""The endpoint against a real server, parsing of replies, and answers that are kept."""

import json
import threading
import time
from types import SimpleNamespace

import protocol
import pytest

from saejax.errors import Interrupted, UserError
from saejax.interpret import judges
from saejax.interpret.judges import ANSWERS, KEY, Answer, Answers, Endpoint
from saejax.interpret.questions import Question, read_judgements, read_label
from saejax.interpret.settings import ExplainConfig
from saejax.parallel.processes import ProcessShare
from saejax.runner.parts import Progress

ASK = [Question("Say it.", f"number {i}") for i in range(6)]


@pytest.fixture
def waits(monkeypatch):
    """The client's waits before it asks again, in seconds; they are not waited for."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def ask(server, questions=ASK, timeout=60.0):
    endpoint = Endpoint(server.url, "judge", timeout)
    return [endpoint.ask(question) for question in questions]


def test_answers_come_in_their_places_however_many_are_asked_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY, "secret")
    with protocol.Server(lambda prompt: prompt[-1]) as server:
        answers = answers_of(tmp_path, Endpoint(server.url, "judge"), concurrency=8)
        assert answers.all(ASK, "labels") == list("012345") and answers.tokens == 6 * (4 + 7)
        _, body, headers, path = server.tries[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge" and body["temperature"] == 0 and body["max_tokens"] == 4096
    assert body["chat_template_kwargs"] == dict(enable_thinking=False)


@pytest.mark.parametrize("trouble", [500, 503, 408, 429, "closed", "slow"])
def test_what_may_succeed_later_is_asked_again(trouble, waits):
    with protocol.Server(lambda prompt: "yes", [trouble, trouble]) as server:
        assert ask(server, ASK[:1], timeout=1.0 if trouble == "slow" else 60.0)[0].text == "yes"
        # On a busy machine the answer, too, may take longer than "slow" is given.
        assert 3 <= len(server.tries) == len(waits) + 1 and all(0 < wait <= 8 for wait in waits)


def test_a_server_that_asks_for_a_pause_gets_it(waits):
    with protocol.Server(lambda prompt: "yes", [429], retry_after="55") as server:
        ask(server, ASK[:1])
    assert waits == [55]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [(status, f"refuses the question: status {status}") for status in (401, 403, 404, 422)]
    + [("sold out", "refuses the question: status 400: .*sold out")]
    + [(reply, "gave no answer") for reply in ("nonsense", "no choices")],
)
def test_where_asking_again_would_not_help_it_ends(trouble, message):
    with protocol.Server(lambda prompt: "yes", [trouble]) as server:
        with pytest.raises(UserError, match=message):
            ask(server, ASK[:1])
        assert len(server.tries) == 1


def test_parameters_that_a_model_refuses_are_renamed_or_dropped():
    """As OpenAI's reasoning models and strict servers word it; later questions are sent so at once."""
    refusals = [
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
        "Unrecognized request argument supplied: chat_template_kwargs",
    ]
    with protocol.Server(lambda prompt: "yes", refusals) as server:
        assert [answer.text for answer in ask(server, ASK[:2])] == ["yes", "yes"]
        bodies = [body for _, body, *_ in server.tries]
    assert len(bodies) == 5
    # As servers with strict schemas refuse (Mistral's), and behind a long preamble.
    for status, message in ((422, "{'loc': ['body', 'chat_template_kwargs'], 'msg': 'Extra inputs are not permitted'}"),
                            (400, 400 * "x" + " chat_template_kwargs")):  # fmt: skip
        with protocol.Server(lambda prompt: "yes", [(status, message)]) as server:
            assert ask(server, ASK[:1])[0].text == "yes"
            assert "chat_template_kwargs" not in server.tries[1][1] and server.tries[1][1]["temperature"] == 0
    for body in bodies[3:]:
        assert not {"max_tokens", "temperature", "chat_template_kwargs"} & body.keys()
        assert body["max_completion_tokens"] == 4096


def test_labels_and_judgements_of_a_reply_are_read():
    for reply in ("[EXPLANATION]: past tense", "**[EXPLANATION]:** past tense", "Explanation: `past tense`\n"):
        assert read_label(reply) == "past tense"
    assert read_label("I cannot tell.") is None and read_label("[EXPLANATION]: ") is None
    for reply in (
        "[1, 0, 1]",
        "Texts [1] and [3] are active: [1, 0, 1]",
        "```json\n[true, false, true]\n```",
        "<think>[0, 0, 0]</think>[1, 0, 1]",
        "Text 1: 1\nText 2: 0\n**Text 3**: 1",
        "Text 1: yes\nText 2: no\nText 3: Yes.",
        '["1", "0", "1"]',
        "[1, 0, 1,]",
        r"\[1, 0, 1\]",
        '{"answers": [1, 0, 1]}',
        '{"1": 1, "2": 0, "3": 1}',
        "**1, 0, 1**",
    ):
        assert read_judgements(reply, 3) == [True, False, True], reply
    assert read_label("[EXPLANATION]: verbs\nThis explanation: covers all examples.") == "verbs"
    for reply in (
        None,
        "1. 1\n2. 0\n3. 1",
        "1, 0",
        "Texts 1, 0, 1",
        "{1, 0}",
        "[1, 0]",
        "[1, 0, 2]",
        '["a", 0, 1]',
        "Text 1: 1\nText 3: 1",
        "[1, 0, 0.5]",
    ):
        assert read_judgements(reply, 3) is None, reply


def test_an_endpoint_that_never_answers_is_given_up(waits):
    with (
        protocol.Server(lambda prompt: "yes", [500] * 6) as server,
        pytest.raises(UserError, match=r"no answer after 5 retries \(status 500"),
    ):
        ask(server, ASK[:1])
    with pytest.raises(UserError, match="no answer after 5 retries"):
        ask(SimpleNamespace(url=server.url), ASK[:1])
    with pytest.raises(UserError, match="is not a URL"):
        Endpoint("localhost:8000", "judge")


def test_no_answer_and_one_that_is_truncated_are_none():
    with protocol.Server(lambda prompt: "yes", ["null", "cut"]) as server:
        assert [answer.text for answer in ask(server, ASK[:3])] == [None, None, "yes"]
    with (
        protocol.Server(lambda prompt: "yes", [(400, "the context is 2048")]) as server,
        pytest.raises(UserError, match="refuses the question: status 400: .*the context is 2048"),
    ):
        ask(server, ASK[:1])
    with protocol.Server(lambda prompt: "yes", ["uncounted"]) as server:  # usage without numbers: estimated
        assert ask(server, ASK[:1]) == [Answer("yes", len("Say it.number 0yes") // 4)]


class Counting:
    """Answers with the question's text, and fails at a question."""

    def __init__(self, fails_at=""):
        self.fails_at, self.asked = fails_at, []

    def ask(self, question):
        if question.text == self.fails_at:
            raise UserError("no more")
        self.asked.append(question.text)
        return Answer(question.text, 11)


def answers_of(folder, endpoint, limit=10_000, stopping=lambda: False, model="judge", concurrency=1):
    run = SimpleNamespace(stage="explain", say=lambda line: None, stopping=stopping, share=ProcessShare())
    config = ExplainConfig(most_tokens=limit, model=model, concurrency=concurrency)
    return Answers(folder, endpoint, config, lambda label: Progress(run, "answers").of_part(label, 0))


def test_what_was_answered_is_never_asked_again(tmp_path):
    judge = Counting(fails_at="number 3")
    with pytest.raises(UserError, match="no more"):
        answers_of(tmp_path, judge).all(ASK, "labels")
    lines = (tmp_path / ANSWERS).read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == judge.asked
    assert judge.asked[:3] == ["number 0", "number 1", "number 2"]
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"question": "half a li')  # killed
    again, third, changed = Counting(), Counting(), Counting()
    answers = answers_of(tmp_path, again)
    assert answers.all([*ASK, ASK[0]], "labels") == [*(question.text for question in ASK), ASK[0].text]
    assert sorted(judge.asked + again.asked) == [question.text for question in ASK] and answers.tokens == 66
    with (tmp_path / ANSWERS).open("ab") as file:
        file.write('{"text": "é'.encode()[:-1])  # killed within a letter
    answers_of(tmp_path, third).all(ASK, "labels")
    answers_of(tmp_path, changed, model="other").all(ASK[:1], "labels")
    assert not third.asked and changed.asked == ["number 0"]


def test_line_separators_and_unpaired_surrogates_are_kept_in_answers(tmp_path):
    """Unicode has further line ends than the file; a reply may hold what no file in UTF-8 can."""
    question, counting = Question("Say it.", "a\u2028b\x85c"), Counting()
    assert answers_of(tmp_path, counting).all([question], "labels") == [question.text]
    again = answers_of(tmp_path, counting)
    assert again.all([question], "labels") == [question.text] and len(counting.asked) == 1 and again.tokens == 11
    with protocol.Server(lambda prompt: "a \ud83d") as server:
        answers = answers_of(tmp_path / "other", Endpoint(server.url, "judge"))
        assert answers.all(ASK[:1], "labels") == ["a \N{REPLACEMENT CHARACTER}"]


def test_a_run_that_is_told_to_stop_does_not_wait_long_for_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "_LAST", 2.0)
    told, heard, never = threading.Event(), threading.Event(), threading.Event()

    def answer(question):
        if question.text.endswith("5"):
            told.set()
            heard.wait(60)  # it comes soon after the run has heard of it, and is kept
        elif question.text.endswith("4"):
            never.wait(60)
        return Answer(question.text[-1], 1)

    start = time.monotonic()
    with pytest.raises(Interrupted):
        judge = SimpleNamespace(ask=answer)
        stopping = lambda: told.is_set() and not heard.set()  # noqa: E731
        answers_of(tmp_path, judge, stopping=stopping, concurrency=2).all(ASK, "labels")
    assert time.monotonic() - start < 30
    kept = [json.loads(line)["answer"] for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert sorted(kept) == list("01235")
    never.set()


def test_the_limit_of_tokens_holds_and_can_be_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "_LOT", 2)
    judge, left = Counting(), r"most_tokens=30: 44 tokens are spent and 2 questions are left"
    with pytest.raises(UserError, match=left):
        answers_of(tmp_path, judge, limit=30).all(ASK, "labels")
    assert len(judge.asked) == 4
    with pytest.raises(Interrupted, match="what was measured is kept"):
        answers_of(tmp_path, judge, stopping=lambda: True).all(ASK, "labels")
    assert len(answers_of(tmp_path, judge).all(ASK, "labels")) == len(ASK) == len(judge.asked)
