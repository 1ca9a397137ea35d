"""The client asks, reads, retries and reports; whether a judge is right is what its controls test."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.trainers.judges.vlm.servers import KEY, FakeServer
from trainers.judges.vlm import (
    Abilities,
    AnswerError,
    Client,
    JudgeConfig,
    JudgeError,
    Question,
    Recorder,
    Replay,
    Shown,
    bundled_templates,
    fitness,
    in_order,
    judge_case,
    load_picture,
    load_template,
    parse_boxes,
    parse_judge,
    parse_scores,
    parse_yes_no,
)
from trainers.judges.vlm.parse import parse_named
from trainers.judges.vlm.transfer import pictures_per_case, transfer_notice

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (5, 7), "blue")
SHOWN = Shown("make it blue", load_picture(BLUE), (load_picture(RED),), load_picture(BLUE))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


def client(server: FakeServer, **options) -> Client:
    config = JudgeConfig(server.url, "fake", api_key_env="JUDGE_KEY", **{"timeout": 5, **options})
    return Client(config, abilities=Abilities(), sleep=lambda _: None)


def test_pictures_arrive_in_their_order_and_after_two_faults_the_answer_is_read():
    server = FakeServer(faults=[429, "cut", "think"])
    question = Question(("rate", load_picture(RED), load_picture(BLUE)))
    answer = client(server).ask(question)
    assert (parse_scores(answer.text, 2), answer.tries) == ([7, 9], 3)
    urls = [part["image_url"]["url"] for part in server.bodies[-1]["messages"][0]["content"][1:]]
    assert urls == [load_picture(RED).url, load_picture(BLUE).url]
    swapped = Question(("rate", load_picture(BLUE), load_picture(RED)))
    assert swapped.key("fake", 0, 1) != question.key("fake", 0, 1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("html", "web page"),
        ("list", "JSON object"),
        ((302, "http://example.org/v1"), "redirects to example.org"),
        ((302, "http://[::1/v1"), "cannot be asked .*; correct judge.base_url"),
        ((300, "http://[::1/v1"), "redirects to another address"),
        (401, "refuses the key"),
        (404, "404"),
    ],
)
def test_faults_of_the_server_stop_the_run_in_one_sentence_without_the_key(fault, words):
    server = FakeServer(faults=[fault])
    with pytest.raises(JudgeError, match=words) as caught:
        client(server).ask(Question(("rate",)))
    assert KEY not in str(caught.value)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://[::1:8000/v1", "base_url must be an address such as"),
        ("http://127.0.0.1:9/v\u00f6", "in ASCII characters without spaces, got 'http://127.0.0.1:9/v\u00f6'"),
        ("http://127.0.0.1:9/v 1", "base_url must be an address such as"),
        ("http://me:secret-key@127.0.0.1:abc/v1", "base_url must be an address such as .* got one with '@'"),
        (f"http://{'a' * 64}.invalid/v1", "cannot be asked .*label.*; correct judge.base_url"),
    ],
)
def test_an_address_that_no_request_can_hold_is_one_sentence(url, words):
    config = JudgeConfig(url, "fake", api_key_env="JUDGE_KEY")
    with pytest.raises(JudgeError, match=words) as caught:
        Client(config, abilities=Abilities(), sleep=lambda _: None).ask(Question(("rate",)))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["sk\nsecret", "sk-\u201csecret\u201d"])
def test_a_key_that_no_request_can_hold_is_one_sentence_without_it(key, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(JudgeError, match="JUDGE_KEY contains characters that no key has") as caught:
        Client(JudgeConfig("http://127.0.0.1:9/v1", "fake", api_key_env="JUDGE_KEY"))
    assert "secret" not in str(caught.value)


def test_one_refused_question_is_missing_and_three_in_a_row_stop_the_run():
    asker = client(FakeServer(faults=[400, *[429] * 20]), tries=2)
    with pytest.raises(AnswerError) as caught:
        asker.ask(Question(("rate",)))
    assert caught.value.kind == "rejected"
    for _ in range(2):
        with pytest.raises(AnswerError):
            asker.ask(Question(("rate",)))
    with pytest.raises(JudgeError, match="429"):
        asker.ask(Question(("rate",)))


def test_nobody_listens_slow_and_unknown_names():
    server = FakeServer(faults=["slow"] * 2)
    with pytest.raises(AnswerError, match="nothing within"):
        client(server, timeout=0.1, first_timeout=0.1, tries=2).ask(Question(("rate",)))
    server.shutdown()
    server.server_close()
    with pytest.raises(JudgeError, match="connection refused"):
        client(server, tries=1).ask(Question(("rate",)))
    with pytest.raises(JudgeError, match="needs base_url"):
        parse_judge({"model": "x"})
    with pytest.raises(JudgeError, match="unknown key 'key'"):
        parse_judge({"base_url": "http://localhost/v1", "model": "x", "key": "k"})


@pytest.mark.parametrize(
    ("fault", "kind"), [("prose", "unparsed"), ("range", "unparsed"), ("refuse", "refused"), ("length", "cut")]
)
def test_an_answer_without_scores_is_missing_and_never_invented(fault, kind):
    judged = judge_case(client(FakeServer(faults=[fault])), load_template("edit"), SHOWN)
    assert judged.score is None
    assert [one.failure for one in judged.failures] == [kind]
    assert judged.values == {"semantics": None, "quality": 7}


def test_the_score_of_a_case_by_hand_recorded_and_replayed_without_a_server(tmp_path):
    server = FakeServer('{"score": [4, 9]}')
    file = tmp_path / "answers.jsonl"
    judged = judge_case(Recorder(client(server, passes=2), file), load_template("reference"), SHOWN)
    assert judged.score == pytest.approx(6)  # each question sqrt(4 x 9) = 6, the case sqrt(6 x 6)
    assert KEY not in file.read_text()
    file.write_bytes(file.read_bytes() + b'{"key": "cut by a ki')
    assert judge_case(Replay(file), load_template("reference"), SHOWN) == judged
    with pytest.raises(JudgeError, match="no answer for a question"):
        Replay(file).ask(Question(("another",)))
    Recorder(client(server, passes=2), file)  # goes on behind the cut line
    assert judge_case(Replay(file), load_template("reference"), SHOWN) == judged


def test_every_bundled_template_asks_what_its_parser_reads():
    def answer(body):
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("properties", {})
        if "boxes" in schema:
            return '{"boxes": [[0, 0, 500, 500]]}'
        asked = str(body)
        if "text_adherence" in schema:
            assert set(schema) == {"reasoning", "text_adherence", "subject_consistency", "aesthetic_quality"}
            return '{"text_adherence": 5, "subject_consistency": {"score": 4}, "aesthetic_quality": 3}'
        if "three lines" in asked:
            return "Compliance: 4\nQuality: 3\nPreservation: 5"
        if "digit" in asked:
            return "5"
        return "Yes." if "yes or no" in asked else str([5.0] * schema["score"]["minItems"])

    for name in bundled_templates():
        asker = client(FakeServer(answer))
        asker._abilities = Abilities(response_format="json_schema")
        judged = judge_case(asker, load_template(name), replace(SHOWN, kinds=("subject",)))
        assert judged.failures == [], name
        assert judged.score is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1", "the key 'questions' is missing"),
        ("{version: 1, questions: [{id: a, kind: digit, pictures: [output], ask: b}]}", "the key 'rules' is missing"),
        ("{version: 1, questions: [{id: a, colour: red}]}", "unknown key 'colour' of a question"),
    ],
)
def test_faults_of_a_template_name_the_key(tmp_path, text, words):
    (tmp_path / "edit.yaml").write_text(text)
    with pytest.raises(JudgeError, match=words):
        load_template("edit", tmp_path)


def test_retries_wait_as_the_server_asks_and_longer_each_time_where_it_does_not(monkeypatch):
    """Of this machine, whatever proxy the environment names."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    waits: list[float] = []
    server = FakeServer(faults=[503, "cut", "cut", "cut"])
    config = JudgeConfig(server.url, "fake", api_key_env="JUDGE_KEY", max_wait=1.0)
    Client(config, abilities=Abilities(), sleep=waits.append).ask(Question(("rate",)))
    assert waits[0] == 0  # Retry-After
    assert 0.8 <= waits[1] <= 1.0  # 0.5 s doubled, with jitter
    assert waits[2:] == [1.0, 1.0]  # max_wait


def test_another_machine_is_named_with_what_is_sent_to_it():
    config = JudgeConfig("http://judge.invalid:8000/v1", "m", image_max_side=512)
    assert transfer_notice(config, 30, 12) == (
        "judge: 12 questions with 30 pictures of at most 512 pixels a side WILL LEAVE THIS MACHINE for judge.invalid"
    )
    assert "which is this machine" in transfer_notice(JudgeConfig("http://127.0.0.1/v1", "m"), 1, 1)


def test_the_notice_counts_every_picture_that_is_sent():
    """Sources twice, with the largest number of boxes, so that the count is the upper bound."""
    for name in bundled_templates():
        server = FakeServer(lambda body: '{"boxes": [[0, 0, 500, 500], [0, 0, 9, 9], [1, 1, 3, 3], [4, 4, 8, 8]]}')
        kinds = ("style", "pose")
        sources = (load_picture(RED), load_picture(BLUE))
        shown = Shown("x", load_picture(BLUE), sources, load_picture(BLUE), kinds=kinds)
        judge_case(client(server, max_images=8), load_template(name), shown)
        sent = sum(part["type"] == "image_url" for body in server.bodies for part in body["messages"][0]["content"])
        assert pictures_per_case(load_template(name), 2, 8, kinds) == (len(server.bodies), sent), name


def test_a_recorder_asks_nothing_of_the_server_before_its_first_question(tmp_path):
    server = FakeServer()
    config = JudgeConfig(server.url, "fake", api_key_env="JUDGE_KEY")
    Recorder(Client(config, sleep=lambda _: None), tmp_path / "answers.jsonl")
    assert server.bodies == []


def test_concurrency_is_bounded_and_keeps_the_order():
    most, now, lock = [0], [0], threading.Lock()

    def work(item):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.01)
        with lock:
            now[0] -= 1
        return item

    assert list(in_order(work, range(20), 3)) == list(range(20))
    assert most[0] == 3


def test_nothing_is_asked_after_a_failure_but_the_calls_in_flight():
    asked = []

    def work(item):
        asked.append(item)
        if item == 2:
            raise JudgeError("lost")
        return item

    found = in_order(work, range(20), 1)
    with pytest.raises(JudgeError, match="lost"):
        list(found)
    assert asked == [0, 1, 2]


def test_a_busy_server_that_says_refused_costs_one_question():
    with pytest.raises(AnswerError) as caught:
        client(FakeServer(faults=[507]), tries=1).ask(Question(("text",)))
    assert caught.value.kind == "server"


def test_parsing_by_hand():
    assert parse_scores("scratch [1, 2] and then [3, 4]", 2) == [3, 4]
    assert parse_scores('{"score": [6, 7]} as in [1, 2]', 2) == [6, 7]
    named = 'I see {"a": 1}: {"a": {"score": 2.5, "reasoning": "{}"}, "b": 10, "c": -1}'
    assert parse_named(named, ("b", "a")) == [10, 2.5]
    for text in ('{"a": 1}', '{"a": 1, "b": -1}', '{"a": 1, "b": "9"}', '{"a": 1, "b": null}', "a: 1, b: 2"):
        with pytest.raises(AnswerError):
            parse_named(text, ("a", "b"))
    assert parse_yes_no("**Yes**, it does.")
    assert parse_boxes('```{"boxes": [[0, 100, 500, 1000]]}```') == [(0, 0.1, 0.5, 1)]
    for text in ("yes or no", ""):
        with pytest.raises(AnswerError):
            parse_yes_no(text)


def test_controls_that_are_in_order_are_fit_and_a_judge_that_ties_them_is_not():
    rng = np.random.default_rng(0)
    levels = {"truth": 9.0, "redrawn": 9.0, "shuffled": 6.0, "swapped": 4.0, "background alone": 1.0}
    scores = {name: level + rng.normal(0, 0.5, 30) for name, level in levels.items()}
    assert fitness(scores).fit
    found = fitness(scores | {"swapped": scores["shuffled"]})
    assert not found.fit
    assert "does not separate shuffled from swapped" in found.sentence
