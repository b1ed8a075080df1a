"""The endpoint against a real server: what is asked again and when, what is refused, what is kept."""

import json
import time
from email.utils import formatdate
from types import SimpleNamespace

import protocol
import pytest

from saejax.errors import Interrupted, UserError
from saejax.explain.answers import ANSWERS, Answers
from saejax.explain.endpoint import KEY, Answer, Endpoint
from saejax.explain.questions import EmbeddingRequest, Question
from saejax.parallel.share import ProcessShare
from saejax.runner.config import Configs
from saejax.stages.explain import ExplainConfig

ASK = [Question("Say it.", f"number {i}", 20) for i in range(6)]


def endpoint(server, at_once=1, timeout=60.0):
    """With pauses that are written down and last a hundredth as long."""
    made = Endpoint(server.url, "judge", at_once, timeout)
    made.pauses = []
    made._pause = lambda wait: (made.pauses.append(wait), time.sleep(wait / 100))
    return made


def ask(made, questions=ASK):
    found = {}
    made.ask(questions, found.__setitem__)
    return [found[i] for i in range(len(questions))]


def test_answers_come_in_their_places_however_many_are_asked_at_once(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with protocol.Server(lambda prompt: prompt[-1]) as server:
        answers = ask(endpoint(server, at_once=4))
        _, body, headers, path = server.tries[0]
    assert [answer.text for answer in answers] == list("012345") and answers[0].tokens == (4, 7)
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge" and body["temperature"] == 0 and body["max_tokens"] == 20


@pytest.mark.parametrize("trouble", [500, 503, 408, 429, "closed", "nonsense", "slow"])
def test_what_may_help_is_asked_again(trouble):
    with protocol.Server(lambda prompt: "yes", [trouble, trouble]) as server:
        made = endpoint(server, timeout=2.0 if trouble == "slow" else 60.0)
        assert ask(made, ASK[:1])[0].text == "yes"
        assert len(server.tries) == 3
        first, second = [pause for pause in made.pauses if pause > 0]
        assert 0.375 <= first <= 0.5 and 0.75 <= second <= 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_for_a_pause_gets_it(form):
    header = "55" if form == "seconds" else formatdate(time.time() + 59, usegmt=True)
    with protocol.Server(lambda prompt: "yes", [429], retry_after=header) as server:
        made = endpoint(server)
        ask(made, ASK[:1])
        pauses = [pause for pause in made.pauses if pause > 0]
    assert 30 <= max(pauses) <= 59.5 and made._quiet_until > time.monotonic()


@pytest.mark.parametrize("header", ["3600", "-1", "soon"])
def test_a_pause_that_is_none_or_too_long_is_not_waited_for(header):
    with protocol.Server(lambda prompt: "yes", [429], retry_after=header) as server:
        made = endpoint(server)
        ask(made, ASK[:1])
        assert max(made.pauses) <= 0.5


@pytest.mark.parametrize("status", [401, 403, 404, 422])
def test_what_would_not_help_is_refused_at_once(status):
    with protocol.Server(lambda prompt: "yes", [status]) as server:
        with pytest.raises(UserError, match=f"refuses the question with status {status}"):
            ask(endpoint(server), ASK[:1])
        assert len(server.tries) == 1


def test_newer_models_call_the_limit_otherwise():
    with protocol.Server(lambda prompt: "yes", [400]) as server:
        ask(endpoint(server), ASK[:2])
        assert [("max_completion_tokens" in body) for _, body, *_ in server.tries] == [False, True, True]


COMPARE = EmbeddingRequest("e", ("one",), ("one", "two", "zzz"))


@pytest.mark.parametrize("trouble", [500, 429, "closed", "nonsense"])
def test_embeddings_are_asked_for_again_as_answers_are(trouble):
    with protocol.Server(lambda prompt: "", [trouble]) as server:
        (answer,) = ask(endpoint(server), [COMPARE])
        ((_, body, _, path),) = server.tries[1:]
    (cosines,) = json.loads(answer.text)
    assert cosines == pytest.approx([1, 1 / 3, 0], abs=1e-6) and answer.tokens == (4, 0)
    assert path == "/v1/embeddings" and body == dict(
        model="e", input=["one", "one", "two", "zzz"], encoding_format="float")  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        lambda texts: [],
        lambda texts: protocol.of_letters(texts)[1:],  # one is missing
        lambda texts: [one | dict(index=0) for one in protocol.of_letters(texts)],
        lambda texts: [
            one | dict(embedding=one["embedding"][: 9 + one["index"]]) for one in protocol.of_letters(texts)
        ],
        lambda texts: [one | dict(embedding=[float("nan")]) for one in protocol.of_letters(texts)],
        lambda texts: [one | dict(embedding="AAAA") for one in protocol.of_letters(texts)],
    ],
)
def test_embeddings_that_are_not_one_vector_for_each_text(rows):
    with (
        protocol.Server(lambda prompt: "", vectors=rows) as server,
        pytest.raises(UserError, match=r"6 tries \(its reply is not of this protocol\)"),
    ):
        ask(endpoint(server), [COMPARE])


def test_an_embedding_of_nothing_is_close_to_nothing():
    zero = lambda texts: [one | dict(embedding=[0.0, 0.0]) for one in protocol.of_letters(texts)]  # noqa: E731
    with protocol.Server(lambda prompt: "", vectors=zero) as server:
        assert ask(endpoint(server), [COMPARE])[0].text == "[[0.0, 0.0, 0.0]]"


def test_an_endpoint_that_never_answers_is_given_up():
    with (
        protocol.Server(lambda prompt: "yes", [500] * 6) as server,
        pytest.raises(UserError, match=r"6 tries \(status 500"),
    ):
        ask(endpoint(server), ASK[:1])
    with pytest.raises(UserError, match="no answer in 6 tries"):
        ask(endpoint(SimpleNamespace(url=server.url)), ASK[:1])
    with pytest.raises(UserError, match="is no address"):
        Endpoint("localhost:8000", "judge", 1, 1)


def test_no_answer_and_one_that_is_cut_are_none():
    with protocol.Server(lambda prompt: "yes", ["null", "cut"]) as server:
        assert [answer.text for answer in ask(endpoint(server), ASK[:3])] == [None, None, "yes"]


class Counting:
    """Answers with the question's text, and fails at a question."""

    def __init__(self, fails_at=""):
        self.fails_at, self.asked = fails_at, []

    def ask(self, questions, keep):
        for number, question in enumerate(questions):
            if question.text == self.fails_at:
                raise UserError("no more")
            self.asked.append(question.text)
            keep(number, Answer(question.text, (10, 1)))


def run_of(limit=10_000, stopping=lambda: False, model="judge"):
    config = ExplainConfig(most_tokens=limit, model=model)
    return SimpleNamespace(configs=Configs(config), say=lambda line: None, stopping=stopping, share=ProcessShare())


def test_what_was_answered_is_never_asked_again(tmp_path):
    judge = Counting(fails_at="number 3")
    with pytest.raises(UserError, match="no more"):
        Answers(run_of(), tmp_path, judge).all(ASK, "labels")
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"question": "half a li')  # killed
    again = Counting()
    answers = Answers(run_of(), tmp_path, again)
    assert answers.all([*ASK, ASK[0]], "labels") == [*(q.text for q in ASK), ASK[0].text]
    assert judge.asked == ["number 0", "number 1", "number 2"] and again.asked == ["number 3", "number 4", "number 5"]
    assert answers.spent == (60, 6)
    third = Counting()
    Answers(run_of(), tmp_path, third).all(ASK, "labels")
    assert not third.asked
    other = Counting()
    Answers(run_of(model="other"), tmp_path, other).all(ASK[:1], "labels")
    assert other.asked == ["number 0"]


def test_the_limit_of_tokens_holds_and_can_be_raised(tmp_path):
    judge = Counting()
    with pytest.raises(
        UserError, match=r"most_tokens=50: \d+ tokens are spent and \d questions of about \d+ tokens are left"
    ):
        Answers(run_of(limit=50), tmp_path, judge).all(ASK, "labels")
    assert 0 < len(judge.asked) < len(ASK)
    assert len(Answers(run_of(), tmp_path, judge).all(ASK, "labels")) == len(ASK) == len(judge.asked)


def test_a_run_that_is_to_stop_stops(tmp_path):
    with pytest.raises(Interrupted, match="what was measured is kept"):
        Answers(run_of(stopping=lambda: True), tmp_path, Counting()).all(ASK, "labels")
