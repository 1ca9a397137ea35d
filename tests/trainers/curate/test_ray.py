"""Ray and local processes give the same bytes: two actors, eight shards."""

import pytest

from tests.trainers.curate.test_run import config, contents
from trainers.curate.config import read_stages
from trainers.curate.errors import CurateError
from trainers.curate.manifest.executor import RayExecutor
from trainers.curate.runner import run


def test_two_actors_give_the_same_bytes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.99")
    run(read_stages(config(tmp_path / "local", rows_per_shard=4)))
    try:
        run(read_stages(config(tmp_path / "ray", rows_per_shard=4, workers=2)), "ray")
    finally:
        ray.shutdown()
    local = contents(tmp_path / "local" / "out")
    assert len([name for name in local if name.startswith("ingest-")]) == 8
    assert contents(tmp_path / "ray" / "out") == local


def test_ray_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(CurateError, match=r"--executor ray needs Ray; run pip install"):
        RayExecutor(2)
