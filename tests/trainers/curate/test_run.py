"""A run from pictures to rows: again, after kills, on two processes, with bad pictures and a full disk."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

import trainers.curate.filters.measure as measure_module
import trainers.curate.manifest.shards as shards_module
import trainers.curate.stages.ingest as ingest_module
import trainers.curate.stages.listing as listing_module
from tests.paths import PICTURES, ROOT
from trainers.curate.__main__ import main
from trainers.curate.config import read_stages
from trainers.curate.filters.catalogue import FILTERS
from trainers.curate.manifest.shards import RowIndex, StageFolder
from trainers.curate.runner import check_settings, run
from trainers.curate.stages.listing import Entry
from trainers.progress import Progress, duration
from unipic_core.conditioning import picture_files
from unipic_core.errors import UniPicError

DRAWN = {
    "seed": 3,
    "rows_per_shard": 16,
    "workers": 0,
    "ingest": [{"kind": "drawn", "persons": 8, "objects": 16, "backgrounds": 6, "size": 64}],
    "filter": {"flat": None, "duplicates": None, "clutter": {"most": 0.95}},
    "pair": {"rules": "drawn", "rows": 24, "counts": {3: 1, 4: 1}, "always": ["person", "background"]},
    "prompt": {"kind": "drawn"},
    "synthesise": {"kind": "drawn", "size": 64, "attempts": 2},
    "check": {"flat": None, "likeness": None},
    "export": [{"kind": "jsonl"}],
}


def config(folder: Path, **changes) -> Path:
    """STAGES.yaml of a run in this folder."""
    path = folder / "stages.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"out": str(folder / "out"), **DRAWN, **changes}, sort_keys=False), encoding="utf-8")
    return path


def contents(out: Path) -> dict[str, str]:
    """Digest of every file but the store, by path."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "scores.sqlite"
    }


def manifest(out: Path, stage: str) -> list[dict]:
    (folder,) = out.glob(f"{stage}-*")
    return [json.loads(line) for shard in sorted(folder.glob("*.jsonl")) for line in shard.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    assert main(["run", str(config(folder))]) == 0
    return folder / "out"


def test_every_picture_has_a_row_with_a_verdict(finished):
    sources = manifest(finished, "filter")
    assert [row["row"] for row in sources] == list(range(30))
    assert {row["subject"] for row in sources} == {"person", "object", "background"}
    for row in sources:
        assert set(row["filters"]) == {"flat", "duplicates", "clutter"}
        assert all(verdict["rank"] == "numpy" for verdict in row["filters"].values())
        assert row["keep"] is all(verdict["keep"] for verdict in row["filters"].values())
    targets = manifest(finished, "check-1")
    assert len(targets) == 24
    for row in targets:
        assert (row["attempt"], row["parent"], row["keep"]) == (1, None, True)
        assert row["filters"]["likeness"]["score"] == 99
        for number in range(1, len(row["sources"]) + 1):
            assert f"image {number}" in row["instruction"].lower()
    assert Counter(len(row["sources"]) for row in targets) == {3: 12, 4: 12}
    things = Counter(source["category"] for row in targets for source in row["sources"])
    assert min(things["small thing"], things["large thing"]) > 6  # balanced by category, not by the number of pictures
    folders = [path.name for path in finished.iterdir()]
    for sheet in finished.glob("filter-*/*.png"):
        with Image.open(sheet) as page:
            assert page.width == 8 * 112
    assert len(list(finished.glob("filter-*/*.png"))) == 3, folders


def test_pictures_of_the_rows_are_the_sources(finished):
    rows = [json.loads(line) for line in (finished / "export/jsonl/data.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for row in rows:
        for name in (*row["input_images"], row["output_image"]):
            data = (finished / "export/jsonl" / name).read_bytes()
            assert hashlib.sha256(data).hexdigest()[:32] == Path(name).stem


def test_a_second_run_writes_nothing(finished, monkeypatch):
    before, times = contents(finished), {p: p.stat().st_mtime_ns for p in finished.rglob("*.jsonl")}
    times.pop(finished / "export/jsonl/data.jsonl")
    monkeypatch.setattr(measure_module, "measure_batch", no_work)
    monkeypatch.setattr(ingest_module, "ingest_batch", no_work)
    assert main(["run", str(finished.parent / "stages.yaml")]) == 0
    assert contents(finished) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def no_work(*_):
    raise AssertionError("this was done before")


def test_another_threshold_measures_nothing_again(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(measure_module, "measure_batch", no_work)
    stricter_filters = {"flat": {"most": 0.65}, "duplicates": None, "clutter": {"most": 0.95}}
    path = config(tmp_path, filter=stricter_filters, pair=None, synthesise=None)
    run(read_stages(path))
    folders = list((tmp_path / "out").glob("filter-*"))
    assert len(folders) == 2  # the old shards were not reused
    stricter = next(one for one in folders if one.name not in {p.name for p in finished.iterdir()})
    rows = [json.loads(line) for shard in stricter.glob("*.jsonl") for line in shard.read_text().splitlines()]
    assert any(row["keep"] is False and row["reason"].startswith("flat ") for row in rows)


class Killed(BaseException):
    """As a signal would end the process: nothing between here and the end of the test may catch it."""


@pytest.mark.parametrize("step", [3, 9, 14, 17, 21, 33, 60, 75])
def test_a_kill_at_any_moment_changes_no_byte(finished, tmp_path, monkeypatch, step):
    calls = 0
    real = os.replace

    def replace(*args, **options):
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed
        return real(*args, **options)

    path = config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            run(read_stages(path))
    run(read_stages(path))
    leftovers = {name: one for name, one in contents(tmp_path / "out").items() if not name.endswith(".part")}
    assert leftovers == contents(finished)


def test_two_processes_give_the_same_bytes(finished, tmp_path):
    run(read_stages(config(tmp_path, workers=2)))
    assert contents(tmp_path / "out") == contents(finished)


def test_bad_pictures_are_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "pictures" / "hat"
    folder.mkdir(parents=True)
    for name in ("panda", "tent", "crown"):
        shutil.copy(PICTURES / f"{name}.png", folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((PICTURES / "panda.png").read_bytes()[:3000])
    (folder / "page.jpg").write_text("<html></html>")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("no picture")
    same = (PICTURES / "panda.png").read_bytes()
    (folder / "panda-again.png").write_bytes(same)
    changes = dict.fromkeys(("pair", "synthesise"))
    path = config(tmp_path, ingest=[{"kind": "folder", "path": str(folder.parent)}], **changes)
    assert main(["run", str(path)]) == 0
    rows = {Path(row["path"]).name: row for row in manifest(tmp_path / "out", "filter")}
    assert {name for name, row in rows.items() if row["keep"]} == {"panda-again.png", "tent.png", "crown.png"}
    assert rows["panda.png"]["reason"] == f"a near duplicate of row {rows['panda-again.png']['row']} (0 bits differ)"
    for name in ("empty.png", "cut.png", "page.jpg", "gone.png", "pipe.png"):
        assert rows[name]["keep"] is False
        assert name in rows[name]["reason"]
        assert "\n" not in rows[name]["reason"]
    printed = capsys.readouterr().out
    assert "ingest: 4 kept, 5 dropped" in printed
    assert "filter: 3 kept, 6 dropped" in printed


def test_rows_of_a_file_and_their_faults(tmp_path):
    shutil.copy(PICTURES / "panda.png", tmp_path)
    lines = [
        json.dumps({"image": "panda.png", "category": "animal", "name": "panda", "group": "bears"}),
        "{not json",
        json.dumps({"picture": "panda.png"}),
        json.dumps({"image": "../panda.png"}),
        json.dumps({"image": "panda.png", "subject": "planet"}),
        json.dumps({"image": "panda.png", "category": 7}),
        json.dumps({"image": "panda.png", "parts": ["a"]}),
        json.dumps({"image": "panda.png", "parts": [{"name": "half \ud800", "category": "hat"}]}),
        json.dumps({"image": "half \ud800.png"}),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    changes = dict.fromkeys(("pair", "synthesise"))
    run(read_stages(config(tmp_path, ingest=[{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}], **changes)))
    rows = manifest(tmp_path / "out", "ingest")
    assert [row["keep"] for row in rows] == [True, *[False] * 8]
    assert rows[0]["category"] == "animal"
    parts = ("is not valid JSON", "has no 'image'", "leaves the folder", "subject must be", "category must be")
    for row, part in zip(rows[1:], (*parts, "parts must be", "parts must be", "no such picture"), strict=True):
        assert part in row["reason"]


def test_a_changed_picture_is_read_again(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(PICTURES / "panda.png", folder / "a.png")
    path = config(tmp_path, ingest=[{"kind": "folder", "path": str(folder)}], pair=None, synthesise=None)
    run(read_stages(path))
    first = {row["id"] for row in manifest(tmp_path / "out", "ingest")}
    shutil.copy(PICTURES / "tent.png", folder / "a.png")
    run(read_stages(path))
    found = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("ingest-*/*.jsonl")]
    assert len({row["id"] for row in found}) == 2
    assert first < {row["id"] for row in found}


def test_drawn_pictures_of_earlier_settings_stay(tmp_path):
    few = {"kind": "drawn", "persons": 1, "objects": 1, "backgrounds": 1}
    for size in (64, 96):
        run(read_stages(config(tmp_path, ingest=[few | {"size": size}], pair=None, synthesise=None)))
    shards = (tmp_path / "out").glob("ingest-*/*.jsonl")
    rows = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert hashlib.sha256((tmp_path / "out" / row["path"]).read_bytes()).hexdigest()[:32] == row["id"]


def one_picture(tmp_path: Path, **changes) -> Path:
    """STAGES.yaml of one opaque picture that is only filtered."""
    (tmp_path / "pictures").mkdir()
    Image.open(PICTURES / "panda.png").convert("RGB").save(tmp_path / "pictures" / "a.png")
    ingest = [{"kind": "folder", "path": str(tmp_path / "pictures")}]
    return config(tmp_path, **{"ingest": ingest, "pair": None, "synthesise": None, **changes})


def no_reading(path: str) -> bytes:
    raise UniPicError(f"{path} cannot be read: Input/output error")


def test_a_picture_that_could_not_be_read_is_measured_by_the_next_run(tmp_path, monkeypatch):
    path = one_picture(tmp_path, filter={"flat": None})
    with monkeypatch.context() as patch:
        patch.setattr(measure_module, "read_bytes", no_reading)
        run(read_stages(path))
    (row,) = manifest(tmp_path / "out", "filter")
    assert row["keep"] is None
    assert "Input/output error" in row["reason"]
    run(read_stages(path))
    (row,) = manifest(tmp_path / "out", "filter")
    assert row["keep"] is True


def test_a_picture_that_has_no_score_is_not_measured_again(tmp_path, monkeypatch):
    path = one_picture(tmp_path, filter={"inside": None})
    run(read_stages(path))
    (row,) = manifest(tmp_path / "out", "filter")
    assert row["reason"] == "inside not run: the picture has no transparency"
    monkeypatch.setattr(measure_module, "measure_batch", no_work)
    run(read_stages(path))


def test_one_picture_of_two_subjects_is_measured_for_both(tmp_path):
    filters = {"flat": {"subjects": ["object"]}, "contrast": {"subjects": ["background"]}}
    path = one_picture(tmp_path, filter=filters, ingest=[{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}])
    lines = [json.dumps({"image": "pictures/a.png", "subject": subject}) for subject in ("object", "background")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    run(read_stages(path))
    assert [row["keep"] for row in manifest(tmp_path / "out", "filter")] == [True, True]


def test_a_picture_that_was_unreadable_is_read_by_the_next_run(tmp_path, monkeypatch):
    """As a HEIC picture is once pillow-heif is installed."""
    path = one_picture(tmp_path, filter={"flat": None})
    Image.open(PICTURES / "tent.png").save(tmp_path / "pictures" / "b.webp")
    Image.open(PICTURES / "crown.png").save(tmp_path / "pictures" / "c.png")
    with monkeypatch.context() as patch:
        patch.setattr(picture_files, "formats", lambda: ("PNG",))
        run(read_stages(path))
    first = manifest(tmp_path / "out", "ingest")
    assert [row["keep"] for row in first] == [True, False, True]
    read = []
    real = ingest_module.ingest_one
    monkeypatch.setattr(ingest_module, "ingest_one", lambda out, one: read.append(one.path) or real(out, one))
    run(read_stages(path))
    second = manifest(tmp_path / "out", "ingest")
    assert read == [str(tmp_path / "pictures" / "b.webp")]
    assert [second[0], second[2]] == [first[0], first[2]]
    assert (second[1]["row"], second[1]["keep"]) == (1, True)


@pytest.fixture
def foreign_names(tmp_path) -> Path:
    """A folder of one picture whose names are in Latin-1."""
    folder = os.fsencode(tmp_path / "pictures") + b"/h\xfcte"
    try:
        os.makedirs(folder)
        Path(os.fsdecode(folder + b"/f\xfcr.png")).write_bytes((PICTURES / "panda.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    return tmp_path / "pictures"


def test_file_names_that_are_not_utf_8(tmp_path, foreign_names, capsys):
    ingest = [{"kind": "folder", "path": str(foreign_names), "subject": "photograph"}]
    path = config(tmp_path, ingest=ingest, pair=None, decompose={"kind": "drawn"}, filter={"flat": None})
    for _ in range(2):
        assert main(["run", str(path)]) == 2
        printed = capsys.readouterr()
        assert "no row passed every check" in printed.err
        assert "h\\udcfcte/f\\udcfcr.png is not drawn; use decompose.kind" in printed.out
    (row,) = manifest(tmp_path / "out", "filter")
    assert Path(row["path"]).read_bytes() == (PICTURES / "panda.png").read_bytes()
    assert row["category"] == "h\\udcfcte"


def test_any_text_comes_back_from_a_shard(tmp_path):
    names = ["für", "绿", "f\udcfcr", "half \ud800", "line\nbreak \u2028"]
    folder = StageFolder(tmp_path, "filter", "key", 2)
    folder.write(0, ({"path": name, "keep": True, "category": name} for name in names))
    folder.shard(1).write_bytes(b'{"path": "f\xfcr", "keep": true, "category": "earlier"}\n')  # of earlier versions
    assert [row["path"] for row in folder.rows()] == [*names, "f\udcfcr"]
    index = RowIndex(folder)
    assert [index[i]["path"] for i in range(len(index))] == [*names, "f\udcfcr"]
    assert folder.shard(0).read_bytes().decode("utf-8").count("\n") == len(names)


@pytest.mark.parametrize("key", ["category", "name", "subject", "group", "parts"])
def test_an_edited_row_is_read_again(tmp_path, key):
    shutil.copy(PICTURES / "panda.png", tmp_path)
    path = config(
        tmp_path, ingest=[{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}], pair=None, synthesise=None
    )
    edits = {"subject": "photograph", "parts": [{"name": "a cub", "category": "animal"}]}
    for edited in ({}, {key: edits.get(key, "bear")}):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "panda.png", **edited}))
        run(read_stages(path))
    found = [json.loads(p.read_text()).get(key) for p in (tmp_path / "out").glob("ingest-*/*.jsonl")]
    assert len(found) == 2
    assert edits.get(key, "bear") in found


def test_the_state_of_pictures_holds_every_field(tmp_path, monkeypatch):
    """A field that the digest omits would be edited without effect."""
    entry = Entry("a.png", "hat", "object", "a hat")
    texts = {one.name: "edited" for one in fields(Entry)}
    edits = {**texts, "parts": ({"name": "a", "category": "b"},), "draw": {"size": 64}}
    stages = read_stages(config(tmp_path))
    states = set()
    for one in (entry, *(replace(entry, **{name: value}) for name, value in edits.items())):
        monkeypatch.setattr(listing_module, "entries", lambda _, one=one: iter([one]))
        states.add(listing_module.listing_state(stages))
    assert len(states) == 1 + len(edits)


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(finished, tmp_path, monkeypatch, capsys):
    path = config(tmp_path)
    real = shards_module.replacing

    def full(target, *args, **options):
        if target.parent.name.startswith("pair-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "replacing", full)
        assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device; free some space and run the same command again" in error
    assert error.count("\n") == 1
    assert main(["run", str(path)]) == 0
    assert contents(tmp_path / "out") == contents(finished)


def test_damaged_files_of_a_run_are_named(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    path = config(tmp_path)
    shard = next((tmp_path / "out").glob("ingest-*/00001.jsonl"))
    shard.write_text("{half")
    assert main(["run", str(path)]) == 2
    assert "cannot be read; remove it and run the same command again" in capsys.readouterr().err
    shard.unlink()
    (tmp_path / "out" / "scores.sqlite").write_bytes(b"no database at all, but some text" * 40)
    assert main(["run", str(path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    (tmp_path / "out" / "scores.sqlite").unlink()
    assert main(["run", str(path)]) == 0
    assert contents(tmp_path / "out") == contents(finished)


def test_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    images = {"base_url": "http://localhost:1/v1", "model": "m", "price_per_call": 0.04, "image_max_side": 1000}
    judge = {"base_url": "http://localhost:1/v1", "model": "m", "image_max_side": 1000}
    path = config(
        tmp_path,
        filter={"flat": None, "quality": None, "head_visible": None},
        prompt={"kind": "endpoint"},
        synthesise={"kind": "endpoint", "attempts": 3},
        check={"presence": None},
        judge=judge,
        images=images,
    )
    assert main(["run", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "ingest: 30 pictures" in text
    assert "filter quality: 30 calls, 0.1 megapixels" in text
    assert "filter head_visible: 8 calls" in text
    assert "prompt: 24 calls, 96.0 megapixels" in text
    assert "synthesise: 24 calls, 96.0 megapixels, at 0.04 each: 0.96; with every attempt 72 calls" in text
    assert "check presence: 96 calls, 120.0 megapixels" in text
    assert not (tmp_path / "out").exists()


def test_dry_run_counts_the_questions_for_the_parts_of_photographs(tmp_path, capsys):
    server = {"base_url": "http://localhost:1/v1", "model": "m", "image_max_side": 1000}
    path = config(
        tmp_path,
        ingest=[{"kind": "drawn_scenes", "samples": 3, "size": 64}],
        filter={"flat": None},
        pair=None,
        decompose={"kind": "endpoint"},
        prompt={"kind": "templates"},
        synthesise={"kind": "endpoint"},
        check={"flat": None},
        judge=dict(server),
        images=dict(server),
    )
    assert main(["run", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "decompose: 3 rows with at most 18 sources" in text
    assert "decompose, parts: 3 calls, 3.0 megapixels" in text
    assert "decompose: 18 calls, 18.0 megapixels" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": {"sharp": None}}, "filter.sharp: there is no such filter; known: pixels"),
        ({"filter": {"flat": {"most": "much"}}}, "config.filter.flat.most must be float"),
        ({"pair": {**DRAWN["pair"], "counts": {7: 1}}}, "counts must be from 1 to 6 sources, got 7"),
        ({"pair": {**DRAWN["pair"], "always": ["hats"]}}, "pair.always: there is no category 'hats'; known: person"),
        ({"pair": {**DRAWN["pair"], "rules": "nowhere.yaml"}}, "cannot read nowhere.yaml"),
        ({"synthesise": None}, "pair (or decompose) and synthesise go together"),
        ({"synthesise": {"kind": "endpoint"}}, "synthesise.kind endpoint needs the section images"),
        ({"synthesise": {"kind": "pipeline"}}, "model goes with kind pipeline"),
        ({"synthesise": {"kind": "pipeline", "model": "/nowhere"}}, "synthesise.model: expected a folder of weights"),
        ({"synthesise": {"kind": "endpoint"}, "images": {"base_url": "localhost:1", "model": "m"}}, "images.base_url"),
        ({"images": {"base_url": "http://localhost:1", "model": "m", "tries": 0}}, "images.tries must be a whole"),
        ({"prompt": {"kind": "endpoint"}}, "prompt.kind endpoint needs the section judge"),
        ({"ingest": []}, "ingest needs at least one set of pictures"),
        ({"ingest": [{"kind": "folder", "path": "/nowhere"}]}, "ingest[0].path: expected a folder of pictures"),
        ({"ingest": [{"kind": "folder"}]}, "path is for the kinds folder and jsonl"),
        ({"seeds": 3}, "unknown key 'seeds'"),
        ({"judge": {"base_url": "http://localhost:1/v1"}}, "needs model"),
        ({"judge": {"replay": "/nowhere.jsonl"}}, "cannot read /nowhere.jsonl"),
    ],
)
def test_faults_of_the_config_come_first(tmp_path, capsys, changes, message):
    assert main(["run", str(config(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "drawn").exists()


def test_rows_that_cannot_be_paired_say_why(tmp_path):
    few = [{"kind": "drawn", "persons": 3, "objects": 1, "backgrounds": 1, "size": 64}]
    pairs = {"rules": "drawn", "rows": 8, "counts": {6: 1}, "always": ["person", "background"], "tries": 5}
    with pytest.raises(ValueError, match=r"no row passed every check \(there are no rows\)"):
        run(read_stages(config(tmp_path, ingest=few, filter={"flat": None}, pair=pairs)))
    rows = manifest(tmp_path / "out", "pair")
    assert len(rows) == 8
    assert all((row["keep"] is False and "6 sources" in row["reason"]) or "too few" in row["reason"] for row in rows)
    assert any(row["rejected"] for row in rows)


def test_changed_phrases_change_the_instructions(tmp_path):
    rules = (ROOT / "trainers" / "curate" / "conflicts" / "drawn.yaml").read_text(encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(rules, encoding="utf-8")
    pairs = {**DRAWN["pair"], "rules": str(tmp_path / "rules.yaml"), "rows": 4}
    path = config(tmp_path, pair=pairs, prompt={"kind": "templates"}, check={})
    run(read_stages(path))
    first = manifest(tmp_path / "out", "prompt")
    (tmp_path / "rules.yaml").write_text(rules.replace("before {}", "far from {}"), encoding="utf-8")
    run(read_stages(path))
    shards = (tmp_path / "out").glob("prompt-*/*.jsonl")
    texts = {json.loads(line)["instruction"] for shard in shards for line in shard.read_text().splitlines()}
    old = {row["instruction"] for row in first}
    assert texts == old | {text.replace("before", "far from") for text in old}
    assert len(texts) == 8


def test_the_time_left_follows_the_work_of_this_run():
    now = 0.0
    progress = Progress("filter", 1000, clock=lambda: now)
    assert progress.line() == "filter: 0 of 1,000 pictures"
    progress.skip(900)
    now = 10.0
    progress.add(10)
    assert progress.line() == "filter: 910 of 1,000 pictures, 1 a second, 1 min 30 s left"
    assert [duration(s) for s in (3.4, 61, 7300)] == ["3 s", "1 min 1 s", "2 h 1 min"]


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    example = page.partition("```yaml\n")[2].partition("```")[0]
    configs = ROOT / "trainers" / "curate" / "configs"
    assert example == (configs / "drawn.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("stages.yaml").write_text(example, encoding="utf-8")
    assert main(["run", "stages.yaml"]) == 0
    assert len(Path("runs/curated-drawn/export/jsonl/data.jsonl").read_text().splitlines()) == 60
    check_settings(read_stages(configs / "paper.yaml"))


def test_every_filter_stands_in_the_documentation():
    page = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    assert not [name for name in FILTERS if f"`{name}`" not in page]
