"""De&Re with the drawn set, exports, and training on what comes out without a hand touching it."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from tests.paths import ROOT
from tests.trainers.curate.test_run import config, manifest, no_reading
from trainers.bench.cases import read_cases
from trainers.cache import main as cache_main
from trainers.config.run import DataConfig
from trainers.curate.config import read_stages
from trainers.curate.export.webdataset import write_tar
from trainers.curate.runner import run as curate
from trainers.curate.stages import likeness
from trainers.curate.synthesis import pipeline
from trainers.data.sources import open_source
from trainers.judges.vlm import png_of
from trainers.train import main as train_main
from unipic_core.errors import UniPicError

BUNDLED = ROOT / "unipic_core" / "models" / "unipic-nano"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    kinds = [{"kind": "jsonl"}, {"kind": "webdataset", "rows_per_tar": 10}, {"kind": "mico"}]
    curate(read_stages(config(folder, export=kinds)))
    return folder / "out" / "export"


@pytest.fixture(scope="module")
def recomposed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dere")
    changes = {
        "ingest": [{"kind": "drawn_scenes", "samples": 10, "size": 64}],
        "filter": {"flat": None},
        "pair": None,
        "decompose": {"kind": "drawn"},
        "prompt": {"kind": "templates"},
        "export": [{"kind": "jsonl"}, {"kind": "mico"}],
    }
    curate(read_stages(config(folder, **changes)))
    return folder / "out"


def test_drawn_photographs_come_back_exactly(recomposed):
    rows = manifest(recomposed, "check-1")
    assert {len(row["sources"]) for row in rows} == {2, 3, 4, 5, 6}
    assert all(row["filters"]["likeness"]["score"] == 99 for row in rows)
    mico = [json.loads(line) for line in (recomposed / "export/mico/data.jsonl").read_text().splitlines()]
    folder = recomposed / "export/mico"
    for row in mico:
        assert (folder / row["reference"]).read_bytes() == (folder / row["output"]).read_bytes()
        assert row["Task"] == "De&Re"
        assert all(row["input"][i] for i in row["human_indices"])


def test_all_exports_hold_the_same_rows(exported):
    lines = (exported / "jsonl/data.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    table = pyarrow.parquet.read_table(exported / "webdataset/metadata.parquet").to_pylist()
    assert [row["target_id"] for row in table] == [row["id"] for row in rows]
    assert [row["tar"] for row in table] == ["00000.tar"] * 10 + ["00001.tar"] * 10 + ["00002.tar"] * 4
    assert json.loads(table[0]["scores"])["likeness"] == 99
    with tarfile.open(exported / "webdataset/00000.tar") as tar:
        assert tar.getnames()[0] == f"{table[0]['key']}.image_1.png"
    data = DataConfig(folder="x", kind="jsonl", path=str(exported / "jsonl/data.jsonl"), size=64, reference_budget=64)
    tars = replace(data, kind="webdataset", path=str(exported / "webdataset"))
    ours, theirs = open_source(data), open_source(tars)
    assert len(ours) == len(theirs) == 24
    for i in (0, 11, 23):
        one, other = ours[i], theirs[i]
        assert one.prompt == other.prompt == rows[i]["instruction"]
        assert (one.target == other.target).all()
        assert [r.shape for r in one.references] == [r.shape for r in other.references]


@pytest.mark.parametrize("names", [("a.jfif", "b.avif"), ("a.JPE", "b.png"), ("a", "b.download")], ids=str)
def test_sources_of_any_ending_come_back_from_tars(tmp_path, names):
    for name, form in zip((*names, "t.png"), ("JPEG", "TIFF", "PNG"), strict=True):  # the content decides, not the name
        Image.new("RGB", (64, 64), "red").save(tmp_path / name, form)
    sources = [{"id": name, "path": name} for name in names]
    about = {"instruction": "Put image 1 on image 2.", "composition": "c", "attempt": 1}
    write_tar(tmp_path / "a.tar", [{"row": 0, "sources": sources, "path": "t.png", **about}], tmp_path)
    source = open_source(DataConfig(folder="x", kind="webdataset", path=str(tmp_path / "a.tar"), size=64))
    assert source.check(0)
    assert len(source.read(0).references) == 2


def test_micos_fields_are_those_that_the_benchmark_reads(exported, tmp_path):
    root = exported / "mico"
    for task in ("object_centric", "human_centric", "hoi", "dere"):
        (root / f"mico_bench_{task}.jsonl").write_text(
            (root / "data.jsonl").read_text() if task == "human_centric" else ""
        )
    cases, left_out = read_cases("mico", root, None, 1, tmp_path)
    assert len(cases) == 24
    assert not left_out
    assert all(Path(path).is_file() for case in cases for path in (*case.sources, case.truth))


def test_curated_rows_train(exported, run, tmp_path):
    """The commands trainers.cache and trainers.train on the exported file, as it is."""
    config = {
        "method": "sft",
        "output": str(tmp_path / "run"),
        "steps": 3,
        "batch_size": 2,
        "save_every": 3,
        "sample_every": 3,
        "log_every": 1,
        "optimizer": {"lr": 1e-3},
        "network": {"model": run.network.model},
        "data": {
            "kind": "jsonl",
            "path": str(exported / "jsonl/data.jsonl"),
            "folder": str(tmp_path / "cache"),
            "size": 64,
            "reference_budget": 64,
            "workers": 0,
        },
        "preview": {"samples": 1, "steps": 1},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cache_main([str(tmp_path / "train.yaml")]) == 0
    assert json.loads((tmp_path / "cache/report.json").read_text()) == {
        "rows": 24, "used": 24, "duplicates": 0, "skipped": []
    }  # fmt: skip
    assert train_main([str(tmp_path / "train.yaml")]) == 0
    assert (tmp_path / "run" / "export").is_dir()


def test_targets_by_the_pipeline_are_compared_with_the_compositors_truth(tmp_path):
    """A bar that nothing reaches: every attempt has another seed, and the run says that nothing is left."""
    changes = {
        "pair": {"rules": "drawn", "rows": 1, "counts": {3: 1}, "always": ["person", "background"]},
        "synthesise": {"kind": "pipeline", "model": str(BUNDLED), "steps": 1, "size": 64, "attempts": 2},
        "check": {"likeness": {"least": 90}},
    }
    with pytest.raises(ValueError, match=r"no row passed every check \(1 dropped\)"):
        curate(read_stages(config(tmp_path, **changes)))
    (first,), (second,) = (manifest(tmp_path / "out", f"check-{attempt}") for attempt in (1, 2))
    assert second["parent"] == first["id"] != second["id"]
    for row in (first, second):
        assert 8 < row["filters"]["likeness"]["score"] < 90
        assert row["reason"].startswith("likeness ")
        assert (row["width"], row["height"]) == (64, 64)


def out_of_memory(*_):
    raise UniPicError("there is too little memory; close other programs")


def test_a_target_that_the_pipeline_could_not_make_is_made_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "compose", out_of_memory)
    changes = {
        "pair": {"rules": "drawn", "rows": 1, "counts": {3: 1}, "always": ["person", "background"]},
        "synthesise": {"kind": "pipeline", "model": str(BUNDLED)},
        "check": {"likeness": {"least": 0}},
    }
    path = config(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"no row passed every check \(1 not run\)"):
        curate(read_stages(path))
    (row,) = manifest(tmp_path / "out", "synthesise-1")
    assert row["reason"] == "not synthesised: there is too little memory; close other programs"
    monkeypatch.setattr(pipeline, "compose", lambda *_: png_of(Image.new("RGB", (64, 64), "red")))
    with monkeypatch.context() as patch:
        patch.setattr(likeness, "read_bytes", no_reading)
        with pytest.raises(ValueError, match=r"no row passed every check \(1 not run\)"):
            curate(read_stages(path))
    curate(read_stages(path))  # what could not be compared is compared by the next run too


def test_parts_that_the_pipeline_could_not_make_are_made_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "compose", out_of_memory)
    changes = {
        "ingest": [{"kind": "drawn_scenes", "samples": 1, "size": 64}],
        "filter": {"flat": None},
        "pair": None,
        "decompose": {"kind": "pipeline", "model": str(BUNDLED)},
        "prompt": {"kind": "templates"},
        "check": {},
    }
    path = config(tmp_path, **changes)
    with pytest.raises(ValueError, match="no row passed every check"):
        curate(read_stages(path))
    (row,) = manifest(tmp_path / "out", "decompose")
    assert (row["keep"], row["reason"]) == (None, "not decomposed: there is too little memory; close other programs")
    monkeypatch.setattr(pipeline, "compose", lambda *_: png_of(Image.new("RGB", (64, 64), "red")))
    with pytest.raises(ValueError, match="no row passed every check"):
        curate(read_stages(path))  # the compositor has no scene of these parts
    (row,) = manifest(tmp_path / "out", "decompose")
    assert row["keep"] is True


def test_drawn_photographs_are_decomposed_by_the_pipeline(tmp_path):
    """Every part of the scene is extracted, and the new picture is compared with the photograph itself."""
    changes = {
        "ingest": [{"kind": "drawn_scenes", "samples": 1, "size": 64}],
        "filter": {"flat": None},
        "pair": None,
        "decompose": {"kind": "pipeline", "model": str(BUNDLED), "steps": 1, "size": 64},
        "prompt": {"kind": "templates"},
        "synthesise": {"kind": "pipeline", "model": str(BUNDLED), "steps": 1, "size": 64, "attempts": 1},
        "check": {"likeness": {"least": 3}},
        "export": [{"kind": "mico"}],
    }
    curate(read_stages(config(tmp_path, **changes)))
    (row,) = manifest(tmp_path / "out", "check-1")
    assert [source["subject"] for source in row["sources"]].count("background") == 1
    assert all((tmp_path / "out" / source["path"]).is_file() for source in row["sources"])
    assert row["filters"]["likeness"]["score"] < 99
    (line,) = (tmp_path / "out/export/mico/data.jsonl").read_text().splitlines()
    exported = json.loads(line)
    assert len(exported["input"]) == len(row["sources"])
    photograph = (tmp_path / "out" / row["reference"]).read_bytes()
    assert (tmp_path / "out/export/mico" / exported["reference"]).read_bytes() == photograph
