"""From cases to the page, with a judge that computes its answers from the pixels it is sent."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.paths import TINY
from tests.trainers.judges.vlm.servers import KEY, FakeServer
from trainers.bench.__main__ import main
from trainers.bench.cases import Plan, draw_inputs, drawn_cases
from trainers.nano.emoji import SUBSET


def pixels(part):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))), float)


def looks(body):
    """Colours anywhere weigh most, their places a little; a missing item's colours are missed."""
    pictures = [pixels(part) for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    if len(pictures) < 2:
        return '{"score": [10, 10]}'
    first, second = pictures[0], pictures[-1]
    if first.shape != second.shape:
        return '{"score": [5, 5]}'
    bins = [np.histogramdd(p.reshape(-1, 3), 6, [(0, 256)] * 3)[0].ravel() / p[..., 0].size for p in (first, second)]
    colours = np.minimum(*bins).sum()
    places = np.exp(-((first - second) ** 2).mean() / 4000)
    score = round(10 * float(0.8 * colours**4 + 0.2 * places), 3)
    return json.dumps({"score": [score, score]})


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def judge(tmp_path):
    def write(server, **options):
        fixed = {"logprobs": "off", "response_format": "none", "api_key_env": "JUDGE_KEY", "image_max_side": 128}
        path = tmp_path / "judge.yaml"
        path.write_text(yaml.safe_dump({"judge": {"base_url": server.url, "model": "looks", **fixed, **options}}))
        return str(path)

    return write


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)


def drawn_run(out, n, *systems):
    cases = tuple(drawn_cases(n, 0, out))
    plan = Plan("nano", 0, cases, (), {label: {} for label in systems})
    draw_inputs(plan, anew=True)
    plan.save(out)
    return plan


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def own_run(tmp_path):
    rows = []
    for name, colour in (("a", "red"), ("b", "blue"), ("<b>", "green")):
        picture(tmp_path / f"s_{colour}.png", colour)
        picture(tmp_path / "made" / f"{'_b_' if name == '<b>' else name}.png", colour)
        source = f"s_{colour}.png"
        rows.append({"id": name, "instruction": f"Show {name}.", "sources": [source], "truth": source})
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ["run", "--bench", "own", "--root", str(tmp_path / "cases.jsonl"), "--out", str(out)]
    assert main([*arguments, "--pictures", f"made={tmp_path / 'made'}", "--device", "cpu"]) == 0
    return out


def test_own_cases_judged_recorded_replayed_and_shown(tmp_path, judge):
    out, answers = own_run(tmp_path), tmp_path / "answers.jsonl"
    (out / "results/made/2-3_sources/b.png").write_bytes(b"no picture")
    file = judge(FakeServer(looks))
    score = ["score", "--out", str(out), "--template", "reference"]
    assert main([*score, "--judge", file, "--record", str(answers)]) == 0
    assert main(["score", "--out", str(out)]) == 0
    first = (out / "scores.jsonl").read_text()
    assert main(["report", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    found = report["scores"]["looks, reference 1 (bundled), 128 pixels, log-probabilities off"]["made"]
    assert (found["value"], found["judged"], found["failures"]) == (10.0, "2 of 3", {"picture": 1})
    page = (out / "report.html").read_text()
    assert "Show &lt;b&gt;." in page
    for words in ("looks, temperature 0, 1 pass, seed 1, answers read from text, response format none", "pictures of "):
        assert words in page
    listed = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]
    assert [(row["id"], row["n_refs"], row["score"]) for row in listed if row["judge"].startswith("looks")] == [
        ("a", 1, 10.0), ("b", 1, None), ("<b>", 1, 10.0)
    ]  # fmt: skip
    assert {"task", "instruction", "sources", "output", "system", "seconds"} <= listed[0].keys()
    assert KEY not in page + first + json.dumps(report) + answers.read_text()
    assert "http" not in page.replace("&quot;base_url&quot;: &quot;http", "")
    (out / "scores.jsonl").unlink()
    assert main([*score, "--replay", str(answers)]) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert {row["id"]: row["score"] for row in rows} == {"a": 10.0, "b": None, "<b>": 10.0}


def test_answers_with_half_a_character_are_shown_and_other_settings_are_another_judge(tmp_path, judge, capsys):
    out = own_run(tmp_path)
    server = FakeServer("\ud800 it is fine: [5, 5]")
    score = ["score", "--out", str(out), "--template", "reference", "--judge"]
    assert main([*score, judge(server, passes=2, temperature=0.5)]) == 0
    name = "looks, reference 1 (bundled), 2 passes, temperature 0.5, 128 pixels, log-probabilities off"
    assert f"{name}: 3 of 3 pictures have a score" in capsys.readouterr().out
    assert main([*score, judge(FakeServer("It is nice."))]) == 0
    assert "0 of 3 pictures have a score; without one: unparsed 3 (run again" in capsys.readouterr().out
    assert main(["report", "--out", str(out)]) == 0
    assert "? it is fine" in (out / "report.html").read_text(encoding="utf-8")
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert {judge: found["made"]["judged"] for judge, found in scores.items()} == {
        name: "3 of 3", "looks, reference 1 (bundled), 128 pixels, log-probabilities off": "0 of 3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n", "0", "--pictures", "a=made"], "--n: expected at least 1 case, got 0"),
        (["--n", "-3", "--pictures", "a=made"], "--n: expected at least 1 case, got -3"),
        (["--pictures", "made"], "--pictures: expected LABEL=DIR, got 'made'"),
        (["--pictures", "a=made", "--pictures", "a=other"], "there are two systems named 'a'"),
        (["--pictures", "a=nowhere"], "--pictures a=DIR: expected a folder, got nowhere"),
        (["--pictures", "a b=.", "--pictures", "a_b=."], "the systems 'a b' and 'a_b' share a folder"),
        ([], "expected --model PATH, or --pictures LABEL=DIR"),
    ],
)
def test_faults_of_the_command_are_one_sentence(tmp_path, capsys, options, words):
    picture(tmp_path / "a.png", "red")
    (tmp_path / "cases.jsonl").write_text(json.dumps({"id": "a", "instruction": "x", "sources": ["a.png"]}))
    arguments = ["run", "--bench", "own", "--root", str(tmp_path / "cases.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "5"], "holds a run of other cases; choose another --out"),
        (["--n", "3"], "holds a run of other cases; choose another --out"),
        (["--pictures", "other=nowhere"], "--pictures other=DIR: expected a folder, got nowhere"),
        (["--model", str(TINY), "--budget", "1"], "the reference budget must be"),
        (["--model", str(TINY), "--device", "nothing"], "there is no device 'nothing'"),
        (["--model", str(TINY), "--label", "made"], "there are two systems named 'made'"),
    ],
)
def test_a_refused_run_changes_nothing(tmp_path, capsys, options, words):
    out = tmp_path / "out"
    (tmp_path / "made").mkdir()
    run = ["run", "--bench", "nano", "--n", "2", "--size", "64", "--pictures", f"made={tmp_path / 'made'}"]
    run += ["--device", "cpu", "--out", str(out)]
    assert main(run) == 0
    before = contents(out)
    assert len(before) > 4
    assert main([*run, *options]) == 2
    assert words in capsys.readouterr().err
    assert contents(out) == before
    (out / "inputs/1_truth.png").unlink()
    assert main(run) == 0
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("scores.jsonl", "half", "line 1 is not JSON"),
        ("scores.jsonl", '{"a": 1}', "line 1 is no row of scores; remove the line or the file"),
        ("scores.jsonl", '{"system": "made", "id": "a", "judge": "j", "score": "9"}', "line 1 is no row of scores"),
        ("judge.json", "[", "is damaged; remove it and score again"),
        ("controls.json", '{"a": 1}', "is damaged; remove it and score again"),
        ("bench.json", "{}", "holds no run of trainers.bench"),
    ],
)
def test_damaged_files_of_a_run_are_named(tmp_path, capsys, name, text, words):
    out = own_run(tmp_path)
    (out / name).write_text(text + "\n")
    assert main(["report", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--controls"], "--controls needs a judge; add --judge FILE.yaml or --replay FILE"),
        (["--enforce-cap"], "--enforce-cap needs a judge"),
        (["--replay", "a", "--record", "b"], "expected --record or --replay, got both"),
        (["--replay", "a", "--w-one", "--w-judge"], "expected one kind of weights, got --w-judge and --w-one"),
        (["--replay", "a", "--w-one"], "--w-one is for the bench mico, this run is of own"),
    ],
)
def test_options_of_score_without_an_effect_are_refused(tmp_path, capsys, options, words):
    out = own_run(tmp_path)
    assert main(["score", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_template_of_the_judges_settings_is_asked_unless_an_option_names_another(tmp_path, judge):
    out = own_run(tmp_path)
    score = ["score", "--out", str(out), "--judge", judge(FakeServer(looks), template="reference")]
    assert main(score) == main([*score, "--template", "edit"]) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    names = {row["judge"].removesuffix(" (bundled), 128 pixels, log-probabilities off") for row in rows}
    assert names == {"looks, reference 1", "looks, edit 1"}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a b", "a_b"], "the pictures of the cases 'a b' and 'a_b' would have one name; rename one"),
        (["a", "a"], "two cases with the id 'a'; each needs another"),
    ],
)
def test_cases_that_would_share_a_picture_are_refused(tmp_path, capsys, ids, words):
    picture(tmp_path / "a.png", "red")
    rows = [{"id": one, "instruction": "x", "sources": ["a.png"]} for one in ids]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["run", "--bench", "own", "--root", str(tmp_path / "cases.jsonl"), "--pictures", f"a={tmp_path}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_was_moved_is_scored_from_any_folder(tmp_path, monkeypatch, judge):
    picture(tmp_path / "lists/a.png", "red")
    (tmp_path / "lists/cases.jsonl").write_text(json.dumps({"id": "a", "instruction": "x", "sources": ["a.png"]}))
    picture(tmp_path / "made/a.png", "red")
    monkeypatch.chdir(tmp_path / "lists")
    arguments = ["run", "--bench", "own", "--root", "cases.jsonl", "--pictures", "made=../made", "--device", "cpu"]
    assert main([*arguments, "--out", "../out"]) == 0
    drawn_run(Path("drawn"), 2)
    stored = json.loads(Path("drawn/bench.json").read_text())
    assert stored["cases"][0]["truth"] == "inputs/0_truth.png"
    (tmp_path / "out").rename(tmp_path / "moved")
    Path("drawn").rename(tmp_path / "moved-too")
    monkeypatch.chdir("/")
    assert all(Path(path).is_file() for case in Plan.load(tmp_path / "moved-too").cases for path in case.sources)
    score = ["score", "--out", str(tmp_path / "moved"), "--template", "edit", "--judge"]
    assert main([*score, judge(FakeServer('{"score": [4, 9]}'))]) == 0
    (row,) = map(json.loads, (tmp_path / "moved/scores.jsonl").read_text().splitlines())
    assert row["score"] == 4.0
    monkeypatch.chdir(tmp_path / "lists")
    assert main([*arguments, "--out", "../moved"]) == 0  # the same cases: the run continues


def test_drawn_scenes_are_judged_at_the_size_at_which_they_were_drawn(tmp_path, capsys):
    out = tmp_path / "out"
    (out / "inputs").mkdir(parents=True)
    run = ["run", "--bench", "nano", "--n", "2", "--pictures", f"truth={out / 'inputs'}", "--device", "cpu"]
    assert main([*run, "--size", "96", "--out", str(out)]) == 0
    for index in range(2):  # another program's pictures: the truth
        (out / f"inputs/{index}_truth.png").rename(out / f"inputs/{index}.png")
    assert main([*run, "--out", str(out)]) == 0  # draws the truth again, at the size of the run
    assert {Image.open(path).size for path in (out / "inputs").glob("*_truth.png")} == {(96, 96)}
    assert main([*run, "--size", "128", "--out", str(out)]) == 2
    assert "holds scenes of 96 pixels, got --size 128; choose another --out" in capsys.readouterr().err
    assert main(["score", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows if "PSNR inside" in row["judge"]] == [50, 50]  # the truth, to the bit
    own = ["run", "--bench", "own", "--root", "x.jsonl", "--size", "96", "--out", str(tmp_path / "other")]
    assert main(own) == 2
    assert "--size is for the bench nano" in capsys.readouterr().err


def test_drawn_scenes_are_not_judged_by_scenes_of_other_assets(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (tmp_path / "made").mkdir()
    run = ["run", "--bench", "nano", "--n", "2", "--pictures", f"made={tmp_path / 'made'}", "--out", str(out)]
    assert main(run) == 0
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer/1f3b8.webp").write_bytes((SUBSET / "1f3b8.webp").read_bytes())
    monkeypatch.setenv("UNIPIC_DATA", str(tmp_path / "fewer"))
    before = contents(out)
    for command in (run, ["score", "--out", str(out)]):
        assert main(command) == 2
        assert "drawn from other assets than 1 of 2140 assets from fewer; set UNIPIC_DATA" in capsys.readouterr().err
    assert {path.name for path in contents(out)} - {path.name for path in before} <= {"scores.jsonl"}
    monkeypatch.setenv("UNIPIC_DATA", str(SUBSET))
    assert main(run) == 0


def test_a_case_that_cannot_be_composed_is_listed_and_the_others_are_made(tmp_path, capsys):
    picture(tmp_path / "ok.png", "red")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"id": name, "instruction": "Show it.", "sources": [f"{name}.png"]} for name in ("ok", "bad")]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["run", "--bench", "own", "--root", str(tmp_path / "cases.jsonl"), "--model", str(TINY)]
    assert main([*arguments, "--steps", "1", "--label", "a", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "a: 1 of 2 cases have no picture; see " in capsys.readouterr().out
    (failure,) = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert failure["id"] == "bad"
    assert "cannot be read as a picture" in failure["failure"]
    rows = [{"id": "half", "instruction": "Show \ud800.", "sources": ["ok.png"]}]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([*arguments, "--out", str(tmp_path / "other"), "--device", "cpu"]) == 2
    assert "holds half a character" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, judge, capsys):
    out = own_run(tmp_path)
    server = FakeServer(looks, faults=[None, None, 401])
    arguments = ["score", "--out", str(out), "--template", "reference", "--judge", judge(server, concurrency=1)]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1")
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"system": "cut by a ki')
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["<b>", "a", "b"]
    assert len(server.bodies) == 3 + 4  # two of the first case, the refused one, two for each other case


def test_the_controls_pass_a_judge_that_looks_and_not_one_that_likes_everything(tmp_path, judge, capsys):
    out = tmp_path / "out"
    drawn_run(out, 16)
    score = ["score", "--out", str(out), "--template", "reference", "--controls", "--judge"]
    server = FakeServer(looks, faults=[*[None] * 9, 401])
    assert main([*score, judge(server, concurrency=1)]) == 2
    assert main([*score, judge(server, concurrency=2)]) == 0
    printed = capsys.readouterr().out
    assert "judge: 160 questions with 240 pictures of at most 128 pixels a side, to 127.0.0.1" in printed
    assert "judge: 152 questions with 228 pictures" in printed  # four controls were scored before the stop
    assert len(server.bodies) == 8 + 2 + 152  # two of the control that was refused
    (found,) = json.loads((out / "controls.json").read_text()).values()
    means = [one["mean"] for one in found["means"].values()]
    assert means == sorted(means, reverse=True)
    assert found["fit"], found["sentence"]
    assert main([*score, judge(FakeServer('{"score": [9, 9]}'), seed=2)]) == 0
    fit = {name: found["fit"] for name, found in json.loads((out / "controls.json").read_text()).items()}
    name = "looks, reference 1 (bundled)"
    assert fit == {
        f"{name}, 128 pixels, log-probabilities off": True,
        f"{name}, seed 2, 128 pixels, log-probabilities off": False,
    }
    assert main(["report", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count(f"{name}, seed 2, 128 pixels, log-probabilities off: <b>unfit: over 16 cases") == 1


def test_gedit_and_mico_are_read_and_written_in_their_forms(tmp_path, judge):
    picture(tmp_path / "in.png", "red")
    for name in ("fullset/color_alter/en/k1.png", "mico_bench_hoi/0.png"):
        picture(tmp_path / "made" / name, "red")
    row = {"key": "k1", "task_type": "color_alter", "instruction": "x", "instruction_language": "en"}
    (tmp_path / "gedit.jsonl").write_text(json.dumps(row | {"input_image": "in.png", "Intersection_exist": True}))
    for task in ("object_centric", "human_centric", "hoi", "dere"):
        case = {"input": ["in.png"] * (2 if task == "hoi" else 7), "reference": "in.png", "prompt": "x", "idx": 0}
        (tmp_path / f"mico_bench_{task}.jsonl").write_text(json.dumps(case))
    for bench, options in (("gedit", []), ("mico", ["--w-one"])):
        out = str(tmp_path / bench)
        made = f"made={tmp_path / 'made'}"
        arguments = ["run", "--bench", bench, "--root", str(tmp_path), "--pictures", made, "--out", out]
        assert main([*arguments, "--device", "cpu"]) == 0
        assert main(["score", "--out", out, "--judge", judge(FakeServer('{"score": [4, 9]}')), *options]) == 0
        assert main(["report", "--out", out]) == 0
    made = tmp_path / "gedit/results/made/made_color_alter_gpt_score.csv"
    (line,) = csv.DictReader(made.open())
    assert (line["sementics_score"], line["quality_score"], line["intersection_exist"]) == ("4.0", "4.0", "True")
    summary = json.loads((tmp_path / "mico/results/made/summary.json").read_text())
    assert summary["overall"] == {"mean": 36.0, "count": 1}  # 1 x sqrt(4 x 9) x sqrt(4 x 9)
    entry = json.loads((tmp_path / "mico/results/made/scores/mico_bench_hoi.json").read_text())["0"]
    assert (entry["pq_naturalness"], entry["sc_subject_resemblance"], entry["weight"]) == (4, 9, 1)
    report = json.loads((tmp_path / "mico/report.json").read_text())
    assert len(report["not_covered"]) == 3


def run_pictures(bench, root, tmp_path):
    out = tmp_path / "out"
    arguments = ["run", "--bench", bench, "--root", str(root), "--pictures", f"made={tmp_path / 'made'}"]
    assert main([*arguments, "--out", str(out), "--device", "cpu"]) == 0
    return out


def mico_run(tmp_path):
    picture(tmp_path / "in.png", "red")
    picture(tmp_path / "made/mico_bench_hoi/0.png", "red")
    for task in ("object_centric", "human_centric", "hoi", "dere"):
        case = {"input": ["in.png"] * 2, "reference": "in.png", "prompt": "x", "idx": 0, "human_indices": [0]}
        (tmp_path / f"mico_bench_{task}.jsonl").write_text(json.dumps(case) if task == "hoi" else "")
    return run_pictures("mico", tmp_path, tmp_path)


def answers_by_question(body):
    """Identity 6 of 9, presence yes, all numbers 5."""
    text = " ".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
    return "6" if "Compare the face" in text else "yes" if "yes or no" in text else '{"score": [5, 5]}'


def test_the_judge_gives_the_weights_of_mico_where_it_is_asked_to(tmp_path, judge):
    out = mico_run(tmp_path)
    score = ["score", "--out", str(out), "--judge", judge(FakeServer(answers_by_question))]
    assert main(score) == 2  # neither weights nor a way to them
    assert main([*score, "--w-judge"]) == 0
    (row,) = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert row["judge"].endswith(", W by the judge")
    assert row["weight"] == pytest.approx((6 / 9 + 1) / 2)
    assert row["score"] == pytest.approx(25 * row["weight"])


def scores_by_judge(out):
    rows = map(json.loads, (out / "scores.jsonl").read_text().splitlines())
    return {row["judge"].partition("off, ")[2]: row["score"] for row in rows}


def test_scores_of_mico_with_other_weights_are_another_judges(tmp_path, judge):
    out, weights = mico_run(tmp_path), tmp_path / "w/mico_bench_hoi.json"
    weights.parent.mkdir()
    score = ["score", "--out", str(out), "--judge", judge(FakeServer('{"score": [5, 5]}'))]
    assert main([*score, "--w-one"]) == 0
    for weight in (0.2, 0.8, 0.2):  # the first one again: nothing is asked
        weights.write_text(json.dumps({"0": weight}))
        assert main([*score, "--weights", str(weights.parent)]) == 0
    found = scores_by_judge(out)
    assert found.pop("W = 1") == 25
    assert all(name.startswith("W from files ") for name in found)
    assert list(found.values()) == [5, 20]
    assert len((out / "scores.jsonl").read_text().splitlines()) == 3


def test_the_benchmarks_files_are_of_the_judge_that_scored_last(tmp_path, judge):
    out = mico_run(tmp_path)
    score = ["score", "--out", str(out), "--w-one", "--judge"]
    means = []
    for options in ({}, {"seed": 2}, {}):
        file = judge(FakeServer(json.dumps({"score": [9, 9] if options else [5, 5]})), **options)
        assert main([*score, file]) == main(["report", "--out", str(out)]) == 0
        means.append(json.loads((out / "results/made/summary.json").read_text())["overall"]["mean"])
    assert means == [25, 81, 25]


def test_scores_with_edited_texts_are_another_judges(tmp_path, judge):
    out, server = own_run(tmp_path), FakeServer('{"score": [5, 5]}')
    score = ["score", "--out", str(out), "--judge", judge(server), "--template", "reference"]
    texts = [tmp_path / f"reference.{question}.txt" for question in ("sc", "pq")]
    for words in ("Rate <instruction>.", "Rate it: <instruction>."):
        for path in texts:
            path.write_text(words)
        assert main([*score, "--templates", str(tmp_path)]) == 0
    assert len(server.bodies) == 2 * 2 * 3
    rows = map(json.loads, (out / "scores.jsonl").read_text().splitlines())
    assert len({row["judge"] for row in rows}) == 2


@pytest.mark.parametrize("weights", ["[1]", '{"0": 1.5}', '{"0": "many"}', "{"])
def test_weights_that_are_none_are_refused(tmp_path, judge, capsys, weights):
    out = mico_run(tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "w/mico_bench_hoi.json").write_text(weights)
    file = judge(FakeServer('{"score": [5, 5]}'))
    assert main(["score", "--out", str(out), "--judge", file, "--weights", str(tmp_path / "w")]) == 2
    assert "expected" in capsys.readouterr().err


def test_imgedit_is_asked_by_type_with_the_texts_of_a_checkout(tmp_path, judge):
    picture(tmp_path / "animal/1.jpg", "red")
    cases = {"7": {"id": "animal/1.jpg", "prompt": "Make it blue.", "edit_type": "adjust"}}
    cases["8"] = {"id": "animal/1.jpg", "prompt": "Remove it.", "edit_type": "remove"}
    (tmp_path / "basic_edit.json").write_text(json.dumps(cases))
    texts = {"adjust": "Adjusted? <edit_prompt>", "remove": "Removed? <edit_prompt>"}
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    for key in cases:
        picture(tmp_path / "made" / f"{key}.png", "blue")
    out = run_pictures("imgedit", tmp_path, tmp_path)
    server = FakeServer("It is good.\nPrompt Compliance: 2\nVisual Quality: 5\nPhysical Detail: 5")
    score = ["score", "--out", str(out), "--judge", judge(server), "--templates", str(tmp_path)]
    assert main(score) == main([*score, "--enforce-cap"]) == main(["report", "--out", str(out)]) == 0
    asked = {body["messages"][0]["content"][0]["text"] for body in server.bodies}
    assert {"Adjusted? Make it blue.", "Removed? Remove it."} <= asked
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert {("capped" in judge): found["made"]["value"] for judge, found in scores.items()} == {False: 4.0, True: 2.0}
    assert (out / "results/made/typescore.json").exists()


def omniref_case(index, category, *references):
    edited = [f"{category}/{index}/{one}" for one in references]
    return {"index": index, "category": category, "prompt": "Show image 1.", "edit_image": edited, "image": "no.png"}


def test_omniref_shows_references_by_kind_and_asks_for_the_marks_that_apply(tmp_path, judge):
    subjects = ["transfer_subjects/a hat.png", "transfer_subjects/a cat.png"]
    others = ["background/background.png", "style/reference.png", "pose/skeleton/a_man.jpg"]
    cases = [omniref_case(370, "subject_pose_bg_style", *subjects, *others), omniref_case(3, "subject", *subjects)]
    cases.append(omniref_case(4, "subject", *[f"transfer_subjects/{i}.png" for i in range(7)]))
    for i, name in enumerate(name for case in cases for name in case["edit_image"]):
        picture(tmp_path / name, (20 * i, 0, 0))
    (tmp_path / "test_set.json").write_text(json.dumps(cases))
    for index in (370, 3):
        picture(tmp_path / f"made/{index}.jpg", "blue")  # as the benchmark's own script names them
    out = run_pictures("omniref", tmp_path / "test_set.json", tmp_path)
    marks = {"text_adherence": 8, "subject_consistency": {"score": 6, "reasoning": "x"}, "style_consistency": 4}
    marks |= {"background_consistency": 5, "aesthetic_quality": 7, "lighting_consistency": -1}
    server = FakeServer(json.dumps(marks))
    assert main(["score", "--out", str(out), "--judge", judge(server, concurrency=1)]) == 0
    assert main(["report", "--out", str(out)]) == 0
    content = server.bodies[0]["messages"][0]["content"]
    labels = [part["text"] for part in content[1:] if part["type"] == "text" and part["text"].endswith(":")]
    expected = ["The subject reference 1:", "The subject reference 2:", "The style reference:"]
    assert labels == [*expected, "The background reference:", "The picture to judge:"]  # a pose is not shown
    shown = [int(pixels(part)[0, 0, 0]) for part in content if part["type"] == "image_url"]
    assert shown == [0, 20, 60, 40, 0]
    rows = {row["id"]: row for row in map(json.loads, (out / "scores.jsonl").read_text().splitlines())}
    assert rows["370"]["score"] == pytest.approx((8 + 6 + 4 + 5 + 7) / 5)
    assert rows["3"]["score"] == pytest.approx((8 + 6 + 7) / 3)
    report = json.loads((out / "report.json").read_text())
    assert report["not_covered"] == ["4"]
    (found,) = report["scores"].values()
    assert found["made"]["value"] is None  # no case has a light
    assert found["made"]["parts"]["dimensions"]["style_consistency"] == 4
    lines = [json.loads(line) for line in (out / "results/made/vlm_results.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [370, 3]
    assert lines[1]["style_consistency"] == {"score": -1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"index": 1, "edit_image": []}, "expected 'edit_image', a list of pictures"),
        ({"index": 1, "edit_image": ["depth/a.png"]}, "a reference in 'depth' has no kind"),
        ({"edit_image": ["style/reference.png"]}, "a case has no 'index'"),
        ([], "is not a JSON list of cases"),
    ],
)
def test_faults_of_omnirefs_list_are_named(tmp_path, capsys, row, words):
    (tmp_path / "list.json").write_text(json.dumps([row]))
    arguments = ["run", "--bench", "omniref", "--root", str(tmp_path / "list.json"), "--pictures", f"a={tmp_path}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("source", ["../secret.png", "/etc/secret.png"])
def test_pictures_outside_the_folder_of_their_list_are_refused(tmp_path, capsys, source):
    root = tmp_path / "shared"
    picture(tmp_path / "secret.png", "red")
    root.mkdir()
    (root / "cases.jsonl").write_text(json.dumps({"instruction": "x", "sources": [source]}))
    arguments = ["run", "--bench", "own", "--root", str(root / "cases.jsonl"), "--pictures", f"a={tmp_path}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert f"is outside {root}" in capsys.readouterr().err


def test_a_pixel_judge_that_cannot_separate_its_controls_is_not_reported(tmp_path):
    out = tmp_path / "out"
    for case in drawn_run(out, 2, "truth").cases:
        path = out / "results/truth" / case.result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(case.truth).read_bytes())
    assert main(["score", "--out", str(out)]) == main(["report", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["not_reported"]  # two scenes are too few for some judge
    assert not report["not_reported"].keys() & report["scores"].keys()
    page = (out / "report.html").read_text()
    assert all(note in page for note in report["not_reported"].values())
