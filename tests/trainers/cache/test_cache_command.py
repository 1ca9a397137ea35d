"""`python -m trainers.cache`: one model at a time, and no model for a set without a good row."""

import gc
import json
import weakref
from pathlib import Path

import pytest

import trainers.cache as cache
from tests.trainers.cache.small_sets import opened
from trainers.cache import main, read_preview
from trainers.config.run import PreviewConfig
from trainers.data.text_embeddings import text_fingerprint
from unipic_core.pipeline.text_encoder import TextEncoder


@pytest.fixture
def config(folder, jsonl, tmp_path) -> Path:
    data = {k: getattr(jsonl, k) for k in ("folder", "kind", "path", "size", "reference_budget", "samples_per_shard")}
    values = {
        "method": "consistency",
        "output": str(tmp_path / "run"),
        "network": {"model": str(folder), "adapter": {}},
        "data": {**data, "workers": 0},
        "preview": {"samples": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    return tmp_path / "config.yaml"


def test_the_command_leaves_all_that_training_needs(config, folder, jsonl, monkeypatch, capsys):
    assert main([str(config)]) == 0
    name = text_fingerprint(folder)
    assert len(opened(jsonl, name)) == 7
    assert len(read_preview(jsonl, PreviewConfig(samples=2), name)) == 2

    def never(*args, **kwargs):
        raise AssertionError("the encoder is not needed again")

    monkeypatch.setattr(TextEncoder, "from_pretrained", never)
    assert main([str(config)]) == 0
    assert main([str(config), "data.size=64"]) == 2
    assert "holds another data set" in capsys.readouterr().err


def test_one_model_at_a_time(config, monkeypatch):
    """The VAE is gone when the encoder comes, and no model comes before the rows are checked."""
    alive = []
    load_vae, load_text = cache.load_image_vae, TextEncoder.from_pretrained

    def vae(*args):
        made = load_vae(*args)
        alive.append(weakref.ref(made))
        return made

    def encoder(*args):
        gc.collect()
        assert alive
        assert alive[0]() is None
        return load_text(*args)

    monkeypatch.setattr(cache, "load_image_vae", vae)
    monkeypatch.setattr(TextEncoder, "from_pretrained", encoder)
    assert main([str(config)]) == 0


def test_no_good_row_is_an_error_before_anything_loads(config, jsonl, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(cache, "load_image_vae", never)
    monkeypatch.setattr(cache, "text_fingerprint", never)
    Path(jsonl.path).write_text('{"input_images": [], "instruction": "", "output_image": "images/t0.png"}\nno\x1b[2J\n')
    assert main([str(config)]) == 2
    message = capsys.readouterr().err
    assert "no row of" in message
    assert "line 1: no instruction" in message
    assert "report.json" in message
    listed = json.loads(Path(jsonl.folder, "report.json").read_text())
    assert listed["used"] == 0
    assert [s["name"] for s in listed["skipped"]] == ["line 1", "line 2"]
    Path(jsonl.path).write_text("")
    assert main([str(config)]) == 2
    assert "no row of" in capsys.readouterr().err
