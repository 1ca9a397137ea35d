"""Several sets in one run: caches of their own, shares by repeats and weights, alternating steps, and refusals."""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from tests.trainers.cache.small_sets import write_rows
from trainers.cache import main
from trainers.config.run import ConfigError, parse_run, to_dict
from trainers.loop.loop import train
from trainers.methods.sft import SFTTraining


@pytest.fixture
def several(changed, tmp_path):
    """Cache two sets of 9 and 4 rows; a run on both."""

    def make(first=None, second=None, **values):
        sources = [
            {"folder": str(tmp_path / "cache-a"), "path": str(tmp_path / "a" / "rows.jsonl"), **(first or {})},
            {"folder": str(tmp_path / "cache-b"), "path": str(tmp_path / "b" / "rows.jsonl"), **(second or {})},
        ]
        data = {"kind": "jsonl", "size": 64, "reference_budget": 64, "samples_per_shard": 4, "workers": 0}
        config = to_dict(changed(sections={"sft": {"train_text_encoder": False}}, batch_size=2, steps=3))
        alternate = values.pop("alternate", "none")
        run = parse_run(
            {
                **config,
                "data": {**data, "sources": [{"kind": "jsonl", **s} for s in sources], "alternate": alternate},
                **values,
            }
        )
        if not (tmp_path / "cache-a").exists():
            write_rows(tmp_path / "a", 9)
            write_rows(tmp_path / "b", 4)
            (tmp_path / "run.yaml").write_text(json.dumps(plain(to_dict(run))))
            assert main([str(tmp_path / "run.yaml")]) == 0
        return run

    return make


def plain(value):
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def batches(config, count):
    method = SFTTraining(config)
    return [method.order[i].tolist() for i in range(count)], method


def test_all_rows_of_all_sources_come_once_in_an_epoch(several, tmp_path):
    rows, method = batches(several(), 13)
    assert len(method.samples) == method.order.rows == 13
    assert Counter(chain.from_iterable(rows)) == Counter(dict.fromkeys(range(13), 2))
    train(several(), SFTTraining(several()))
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (report["rows"], report["rows_per_epoch"], report["repeated_in_step"]) == (13, 13, 0)


def test_repeats_and_weights(several):
    rows, method = batches(several(second={"repeats": 3}), 21)
    assert method.order.rows == 21
    seen = Counter(chain.from_iterable(rows))
    assert all(seen[row] == 2 for row in range(9))
    assert all(seen[row] == 6 for row in range(9, 13))
    rows, _ = batches(several({"weight": 1}, {"weight": 1}), 200)
    assert 0.4 < np.mean(np.array(rows) >= 9) < 0.6


def test_steps_alternate_between_sources_or_tasks(several):
    rows, _ = batches(several(alternate="sources"), 6)
    assert [min(r) >= 9 for r in rows] == [False, True] * 3
    rows, method = batches(several(alternate="tasks", accumulation=2), 8)
    editing = [set(method.samples.num_references[r] > 0) for r in rows]
    assert editing == [{False}, {False}, {True}, {True}] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first": {"weight": 2}}, "a weight for every source or for none"),
        ({"first": {"weight": 2, "repeats": 2}, "second": {"weight": 1}}, "remove repeats, or the weights"),
        ({"first": {"repeats": 2}, "alternate": "tasks"}, "tasks takes every row once"),
        ({"first": {"weight": 0}, "second": {"weight": 1}}, "weight must be above 0, got 0"),
        ({"first": {"folder": "same"}, "second": {"folder": "same"}}, "a folder of its own, got same twice"),
        ({"first": {"sources": []}, "second": {"kind": "scenes"}}, "data.folder is for every kind but scenes"),
        ({"batch_size": 14}, "different rows"),
    ],
)
def test_what_sources_cannot_be(several, values, message):
    several()
    with pytest.raises(ConfigError, match=message):
        SFTTraining(several(**values))


def test_a_section_is_of_one_set_or_of_several(changed):
    with pytest.raises(ConfigError, match=r"data\.folder belongs into each of data\.sources"):
        changed(sections={"data": {"sources": [{"folder": "a", "kind": "jsonl", "path": "b"}]}})
    with pytest.raises(ConfigError, match="data.alternate: sources needs data.sources"):
        changed(sections={"data": {"alternate": "sources"}})
    with pytest.raises(ConfigError, match="data.sources must be a list of sections"):
        changed(sections={"data": {"sources": ["a"]}})
