"""Synthesis, prompts, checks and parts by servers: targets that fail are made again, and nothing is invented."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.paths import PICTURES
from tests.trainers.curate.servers import LookingServer
from tests.trainers.curate.test_run import config, contents, manifest
from trainers.curate.__main__ import main
from trainers.curate.config import DecomposeConfig, ImagesConfig, SynthesiseConfig, read_stages
from trainers.curate.errors import CurateError
from trainers.curate.filters.catalogue import ENDPOINT
from trainers.curate.runner import run
from trainers.curate.stages.parts import read_parts
from trainers.curate.stages.prompt import checked
from trainers.curate.stages.questions import open_judge, template_of
from trainers.curate.stages.tools import maker_settings
from trainers.judges.vlm import AnswerError, JudgeError
from unipic_core.errors import UniPicError


@pytest.fixture
def photographs(tmp_path) -> Path:
    for category, names in (("person", ("astronaut", "office-worker")), ("hat", ("top-hat",)), ("food", ("pizza",))):
        (tmp_path / "pictures" / category).mkdir(parents=True)
        for name in names:
            shutil.copy(PICTURES / f"{name}.png", tmp_path / "pictures" / category)
    return tmp_path / "pictures"


def served(server: LookingServer, tmp_path: Path, photographs: Path, **changes) -> Path:
    images = {"base_url": server.url, "model": "m", "image_max_side": 64, "tries": 2, "max_wait": 0}
    judge = {"base_url": server.url, "model": "looking", "image_max_side": 64, "tries": 2, "max_wait": 0}
    settings = {
        "ingest": [{"kind": "folder", "path": str(photographs)}],
        "filter": {"flat": None, "quality": None},
        "pair": {"rules": "people", "rows": 6, "counts": {2: 1}, "always": ["person"]},
        "prompt": {"kind": "endpoint"},
        "synthesise": {"kind": "endpoint", "attempts": 3},
        "check": {"quality": None, "presence": None},
        "images": images,
        "judge": judge,
    }
    return config(tmp_path, **(settings | changes))


def test_failed_targets_are_made_again_up_to_the_cap(tmp_path, photographs, capsys):
    """The first picture of two in three prompts is black, and one prompt never works."""
    server = LookingServer(spoil=lambda prompt, call: "image 1 and image 2" in prompt and call == 1)
    path = served(server, tmp_path, photographs)
    run(read_stages(path))
    out = tmp_path / "out"
    first, second = manifest(out, "check-1"), manifest(out, "check-2")
    assert len(first) == 6
    dropped = [row for row in first if row["keep"] is False]
    assert dropped
    assert [row["parent"] for row in second] == [row["id"] for row in dropped]
    assert all(row["attempt"] == 2 and row["keep"] for row in second)
    assert dropped[0]["reason"] == "quality 10 is below 75"
    assert dropped[0]["instruction"].startswith("On a sunny day")
    rows = [json.loads(line) for line in (out / "export/jsonl/data.jsonl").read_text().splitlines()]
    assert sorted(row["attempt"] for row in rows) == [1] * (6 - len(dropped)) + [2] * len(dropped)
    printed = capsys.readouterr().out
    assert "synthesise: 6 calls with 12 pictures to 127.0.0.1, which is this machine" in printed
    assert "4 questions with 4 pictures of at most 64 pixels a side, to 127.0.0.1" in printed


def test_rows_that_never_pass_are_dropped_and_counted(tmp_path, photographs, capsys):
    server = LookingServer(spoil=lambda prompt, call: "pizza" not in prompt and server.calls["edits"] % 2 == 1)
    path = served(
        server, tmp_path, photographs, prompt={"kind": "templates"}, synthesise={"kind": "endpoint", "attempts": 1}
    )
    run(read_stages(path))
    rows = manifest(tmp_path / "out", "check-1")
    dropped = sum(row["keep"] is False for row in rows)
    assert 0 < dropped < 6
    assert f"export: {6 - dropped} rows; left out: {dropped} dropped" in capsys.readouterr().out


def test_a_recording_replays_without_a_server(tmp_path, photographs):
    server = LookingServer()
    record = tmp_path / "answers.jsonl"
    judge = {"base_url": server.url, "model": "looking", "image_max_side": 64, "record": str(record)}
    run(read_stages(served(server, tmp_path / "a", photographs, judge=judge)))
    edits = server.calls["edits"]
    judge = {"replay": str(record)}
    path = served(server, tmp_path / "b", photographs, judge=judge)
    asked = server.calls["completions"]
    run(read_stages(path))
    assert server.calls == {"edits": 2 * edits, "completions": asked}
    assert manifest(tmp_path / "a/out", "check-1") == manifest(tmp_path / "b/out", "check-1")


def test_questions_are_asked_once_and_only_about_what_is_left(tmp_path, photographs):
    server = LookingServer()
    strict = {"flat": {"most": 0.5}, "quality": None}
    path = served(
        server, tmp_path, photographs, filter=strict, pair=None, synthesise=None, prompt={"kind": "templates"}
    )
    run(read_stages(path))
    rows = manifest(tmp_path / "out", "filter")
    left = [row for row in rows if row["filters"]["flat"]["keep"]]
    assert 0 < len(left) < len(rows)
    probes = 2  # log-probabilities, response format
    assert server.calls["completions"] == len(left) + probes
    run(read_stages(path))
    assert server.calls["completions"] == len(left) + probes  # an answered run does not even probe


def test_a_question_that_holds_the_name_is_asked_for_each_name(tmp_path, photographs, capsys):
    shutil.copy(photographs / "food" / "pizza.png", tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    changes = {"ingest": [{"kind": "jsonl", "path": str(rows)}], "pair": None, "synthesise": None}
    path = served(LookingServer(), tmp_path, photographs, **changes, filter={"matches_category": None})
    for names, asked in ((("pizza", "tyre"), 2), (("pizza", "wheel"), 1)):
        rows.write_text("".join(json.dumps({"image": "a.png", "category": name}) + "\n" for name in names))
        run(read_stages(path))
        assert f"judge: {asked} questions" in capsys.readouterr().out


def test_filters_whose_question_holds_the_name_say_so():
    named = {one.name for one in ENDPOINT if "{caption}" in str(template_of(one.name)) and not one.needs_sources}
    assert named == {one.name for one in ENDPOINT if one.asks_by_name}


def test_answers_without_a_score_are_asked_again_by_the_next_run(tmp_path, photographs):
    server = LookingServer()
    abilities = {"logprobs": "off", "response_format": "none", "concurrency": 1}
    judge = {"base_url": server.url, "model": "looking", "tries": 1, "max_wait": 0, **abilities}
    path = served(server, tmp_path, photographs, judge=judge, pair=None, synthesise=None, prompt={"kind": "templates"})
    server.faults = ["prose", 500]
    run(read_stages(path))
    undecided = [row for row in manifest(tmp_path / "out", "filter") if row["keep"] is None]
    assert len(undecided) == 2
    assert undecided[0]["reason"].startswith("quality not run: unparsed: expected 1 number from 0 to 100, got")
    assert "no answer after one try" in undecided[1]["reason"]
    run(read_stages(path))
    assert all(row["keep"] is True for row in manifest(tmp_path / "out", "filter"))
    assert server.calls["completions"] == 6


def test_pictures_that_do_not_come_are_asked_for_again(tmp_path, photographs):
    server = LookingServer()
    images = {"base_url": server.url, "model": "m", "tries": 1, "concurrency": 1, "max_wait": 0}
    changes = {"filter": {}, "check": {"flat": None}, "prompt": {"kind": "templates"}, "judge": {}, "images": images}
    path = served(server, tmp_path, photographs, **changes)
    server.faults = ["url", "cut", 500]
    run(read_stages(path))
    reasons = [row["reason"] for row in manifest(tmp_path / "out", "synthesise-1") if row["keep"] is None]
    assert "an address, which is not followed" in reasons[0]
    assert "the answer holds no picture" in reasons[1]
    assert "HTTP 500 (busy)" in reasons[2]
    assert server.calls["edits"] == 6
    run(read_stages(path))
    assert server.calls["edits"] == 9  # the three that are missing
    whole = [row for folder in (tmp_path / "out").glob("check-1-*") for row in folder.glob("*.jsonl")]
    assert whole
    assert len((tmp_path / "out/export/jsonl/data.jsonl").read_text().splitlines()) == 6


def test_other_settings_of_the_server_make_other_pictures(tmp_path, photographs):
    server = LookingServer()
    images = {"base_url": server.url, "model": "m", "image_max_side": 64}
    changes = {"filter": {}, "check": {"flat": None}, "prompt": {"kind": "templates"}, "judge": {}}
    other = ({"extra": {"quality": "high"}}, {"image_max_side": 32}, {"size": "64x64"}, {"model": "m2"})
    for calls, settings in enumerate(({}, *other), 1):
        run(read_stages(served(server, tmp_path, photographs, **changes, images=images | settings)))
        assert server.calls["edits"] == 6 * calls
    for settings in ({}, {"timeout": 5, "concurrency": 1, "price_per_call": 0.1}):
        run(read_stages(served(server, tmp_path, photographs, **changes, images=images | settings)))
    assert server.calls["edits"] == 30


def test_parts_depend_on_the_settings_of_the_server(photograph_run):
    server, path = photograph_run
    settings = yaml.safe_load(path.read_text())
    for quality in ("low", "high", "high"):
        path.write_text(yaml.safe_dump(settings | {"images": settings["images"] | {"extra": {"quality": quality}}}))
        run(read_stages(path))
    assert sum(count for prompt, count in server.seen.items() if prompt.startswith("Extract")) == 2


def test_pictures_of_default_settings_stay_those_of_earlier_versions():
    assert ImagesConfig("http://localhost:1/v1", "m", size="64x64").picture_settings() == ["m", "64x64"]


@pytest.mark.parametrize("kind", [DecomposeConfig, SynthesiseConfig])
def test_pictures_of_the_pipeline_depend_on_its_weights(tmp_path, kind):
    (tmp_path / "transformer").mkdir()
    weights = tmp_path / "transformer" / "model.safetensors"
    config = kind(kind="pipeline", model=str(tmp_path))
    states = []
    for content, seconds in ((b"one", 1), (b"two", 2), (b"three", 2), (b"three", 2)):
        weights.write_bytes(content)
        os.utime(weights, (seconds, seconds))
        states.append(maker_settings(config, None))
    assert states[0] != states[1] != states[2] == states[3]
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "another.safetensors").touch()
    assert maker_settings(config, None) == states[3]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("html", "answered with a web page"), (429, "HTTP 429 (busy); run again later"), (404, "check the address")],
)
@pytest.mark.parametrize("stage", ["filter", "synthesise"])
def test_a_server_that_never_answers_stops_the_run_and_the_next_one_goes_on(
    tmp_path, photographs, capsys, fault, words, stage
):
    server = LookingServer()
    changes = {"filter": {"flat": None}} if stage == "synthesise" else {}
    path = served(server, tmp_path, photographs, prompt={"kind": "templates"}, check={"flat": None}, **changes)
    server.faults = [fault] * 1000
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    server.faults = []
    assert main(["run", str(path)]) == 0
    assert len((tmp_path / "out/export/jsonl/data.jsonl").read_text().splitlines()) == 6


def test_a_server_that_is_gone_stops_the_run_in_one_sentence(tmp_path, photographs, capsys):
    server = LookingServer()
    path = served(server, tmp_path, photographs)
    server.shutdown()
    server.server_close()
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert "no server is listening; run again later" in error
    assert error.count("\n") == 1


@pytest.fixture
def photograph_run(tmp_path):
    (tmp_path / "pictures").mkdir()
    shutil.copy(PICTURES / "panda.png", tmp_path / "pictures")
    server = LookingServer()
    judge = {"base_url": server.url, "model": "looking", "logprobs": "off", "response_format": "none", "max_wait": 0}
    path = served(
        server,
        tmp_path,
        tmp_path / "pictures",
        ingest=[{"kind": "folder", "path": str(tmp_path / "pictures"), "subject": "photograph"}],
        filter={"flat": None},
        pair=None,
        decompose={"kind": "endpoint"},
        prompt={"kind": "templates"},
        check={"likeness": {"least": 25}},
        export=[{"kind": "mico"}],
        judge={**judge, "tries": 1},
    )
    return server, path


def test_photographs_are_decomposed_by_a_server(photograph_run, tmp_path, capsys):
    _, path = photograph_run
    run(read_stages(path))
    printed = capsys.readouterr().out
    assert "judge: 1 questions with 1 pictures of at most 1024 pixels a side, to 127.0.0.1" in printed
    assert "decompose: at most 6 calls with one picture each to 127.0.0.1" in printed
    (line,) = (tmp_path / "out/export/mico/data.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["ed_idx"], row["Task"], len(row["input"])) == (0, "De&Re", 1)
    folder = tmp_path / "out/export/mico"
    assert (folder / row["reference"]).read_bytes() == (PICTURES / "panda.png").read_bytes()


def test_parts_that_the_judge_did_not_list_are_asked_for_again_and_once(photograph_run, tmp_path):
    server, path = photograph_run
    server.faults = ["prose"]
    with pytest.raises(UniPicError, match="no row passed every check"):
        run(read_stages(path))
    (row,) = manifest(tmp_path / "out", "decompose")
    assert row["keep"] is None
    assert row["reason"].startswith("not decomposed: the judge listed no parts (expected a JSON object")
    run(read_stages(path))
    asked = server.calls["completions"]
    assert asked == 2
    for folder in (tmp_path / "out").glob("decompose-*"):
        shutil.rmtree(folder)  # as after a kill: the answers are stored apart
    run(read_stages(path))
    assert server.calls["completions"] == asked


def test_a_photograph_with_other_parts_is_decomposed_again(photograph_run, tmp_path):
    """In another row, or in the same one after an edit."""
    server, path = photograph_run
    rows = tmp_path / "pictures" / "rows.jsonl"
    settings = yaml.safe_load(path.read_text()) | {"ingest": [{"kind": "jsonl", "path": str(rows)}], "judge": {}}
    path.write_text(yaml.safe_dump(settings))
    about = {"image": "panda.png", "category": "photograph", "subject": "photograph"}
    for names in (["a panda", "bamboo"], ["a panda", "a leaf"]):
        parts = [[{"name": name, "category": "thing"}] for name in names]
        rows.write_text("".join(json.dumps(about | {"parts": one}) + "\n" for one in parts))
        run(read_stages(path))
    shards = (tmp_path / "out").glob("decompose-*/*.jsonl")
    found = [json.loads(line)["sources"][0] for shard in shards for line in shard.read_text().splitlines()]
    assert sorted(source["name"] for source in found) == ["a leaf", "a panda", "a panda", "bamboo"]
    assert len({source["path"] for source in found}) == 4
    assert sum(count for prompt, count in server.seen.items() if prompt.startswith("Extract")) == 4


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (None, "got none"),
        ([], "got 0"),
        ([{"name": "a", "category": "b"}] * 7, "got 7"),
        (["a hat"], "no name or no category"),
        ([{"name": {"a": 1}, "category": "hat"}], "no name or no category"),
    ],
)
def test_parts_are_never_guessed(parts, words):
    with pytest.raises(AnswerError, match=words):
        read_parts(parts)


def test_an_instruction_names_every_source():
    assert checked("Put image 1 on\nimage 2.", 2) == "Put image 1 on image 2."
    with pytest.raises(UniPicError, match="does not name image 2"):
        checked("Put image 1 there.", 2)
    with pytest.raises(UniPicError, match="no instruction"):
        checked(None, 2)


def test_errors_that_stop_are_not_errors_of_one_picture():
    assert not issubclass(JudgeError, (AnswerError, UniPicError))
    assert callable(contents)


JUDGE = {"base_url": "http://localhost:1/v1", "model": "m"}


def test_settings_that_change_answers_are_part_of_their_key():
    plain = open_judge(JUDGE).key
    assert open_judge({**JUDGE, "timeout": 5, "concurrency": 2}).key == plain
    for name, value in {"extra": {"top_k": 1}, "logprobs": "off", "seed": 2}.items():
        assert open_judge({**JUDGE, name: value}).key != plain


@pytest.mark.parametrize(("name", "value"), [("passes", 3), ("template", "edit")])
def test_settings_of_a_judge_that_curation_does_not_use_are_refused(name, value):
    with pytest.raises(CurateError, match=f"judge.{name} has no effect here"):
        open_judge({**JUDGE, name: value})
