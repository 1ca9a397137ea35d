"""Answers of one word by log-probabilities, where a probe finds them."""

import pytest
from PIL import Image

from tests.trainers.judges.vlm.servers import KEY, FakeServer
from trainers.judges.vlm import Client, JudgeConfig, Recorder, Replay, Shown, ask_question, load_picture, load_template

SHOWN = Shown("x", load_picture(Image.new("RGB", (8, 8), "red")), (load_picture(Image.new("RGB", (8, 8))),))
PROBE = [("7", {"7": 0.9, "8": 0.1})]


def client(server: FakeServer, monkeypatch) -> Client:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return Client(JudgeConfig(server.url, "fake", api_key_env="JUDGE_KEY", timeout=5, seed=4), sleep=lambda _: None)


def reading(asker, template: str):
    (question,) = load_template(template).questions
    return ask_question(asker, question, SHOWN, 4, 0)


@pytest.mark.parametrize(
    ("template", "text", "tokens", "value", "how"),
    [
        ("presence", "Yes.", [("Yes", {"Yes": 0.6, " no": 0.2}), (".", {})], 0.75, "logprobs"),
        ("presence", "No.", [("No", {"No": 0.5, "yes": 0.1, "NO": 0.2})], 0.125, "logprobs"),
        ("identity", "3", [("3", {"3": 0.45, "5": 0.45, "x": 0.1})], 4.0, "logprobs"),
        # only what follows the thinking counts
        (
            "presence",
            "<think>no</think>yes",
            [("no", {"no": 0.9}), ("</think>", {}), ("yes", {"yes": 0.8})],
            1,
            "logprobs",
        ),
        # the answers together are unlikely, or no token is one: the text is read
        ("presence", "Yes.", [("Yes", {"Yes": 0.3, "It": 0.6})], 1.0, "text"),
        ("identity", "6", [("six", {"six": 1.0})], 6.0, "text"),
    ],
)
def test_probabilities_are_read_and_the_text_where_they_are_unclear(monkeypatch, template, text, tokens, value, how):
    server = FakeServer(text)
    server.tokens = PROBE
    asker = client(server, monkeypatch)
    assert asker.abilities.logprobs
    server.tokens = tokens
    found = reading(asker, template)
    assert (found.value, found.how) == (pytest.approx(value), how)
    assert server.bodies[-1]["top_logprobs"] == 20


def test_a_server_without_probabilities_is_read_by_its_text(monkeypatch):
    server = FakeServer("yes")
    asker = client(server, monkeypatch)
    found = reading(asker, "presence")
    assert (found.value, found.how) == (1.0, "text")
    assert asker.abilities == type(asker.abilities)(logprobs=False, response_format="none")
    assert "logprobs" not in server.bodies[-1]


@pytest.mark.parametrize(
    ("text", "expected"), [('{"answer": 7}', "json_schema"), ("The answer is 7", "none")], ids=["json", "prose"]
)
def test_the_supported_form_of_answers_is_probed_once(monkeypatch, text, expected):
    server = FakeServer(text)
    asker = client(server, monkeypatch)
    assert asker.abilities.response_format == asker.abilities.response_format == expected
    forms = [body.get("response_format", {}).get("type") for body in server.bodies]
    assert forms == {"json_schema": [None, "json_schema"], "none": [None, "json_schema", "json_object"]}[expected]
    assert all(body["seed"] == 4 for body in server.bodies)


def test_a_recording_keeps_the_probabilities(monkeypatch, tmp_path):
    server = FakeServer("Yes.")
    server.tokens = PROBE
    asker = client(server, monkeypatch)
    assert asker.abilities.logprobs
    server.tokens = [("Yes", {"Yes": 0.6, "no": 0.2})]
    found = reading(Recorder(asker, tmp_path / "answers.jsonl"), "presence")
    assert reading(Replay(tmp_path / "answers.jsonl"), "presence") == found
    assert found.how == "logprobs"
