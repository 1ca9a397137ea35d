"""Rows held out of training: never trained on, shown in the previews, their loss recorded at fixed times and noise."""

import json
from dataclasses import replace
from itertools import chain

import pytest
import torch

from trainers.cache import cached_samples, main
from trainers.config.run import ConfigError, to_dict
from trainers.data.index import digests_of
from trainers.data.samples import Samples, evenly_spaced, held_out_rows
from trainers.loop.loop import train
from trainers.loop.method import Share
from trainers.methods.sft import SFTTraining

FROZEN = {"train_text_encoder": False}
SMALL = {"size": 64, "reference_budget": 64, "samples": 6, "samples_per_shard": 6, "workers": 0}


@pytest.fixture
def held(changed):
    """A run that holds out a quarter of its 48 rows, of which six are validated."""

    def make(steps=4, **values):
        options = {"share": 0.25, "every": 2, "rows": 6, "draws": 2}
        return changed(sections={"sft": FROZEN, "validation": options}, steps=steps, save_every=2, **values)

    return make


def test_held_out_rows_are_never_trained_and_the_same_in_every_run(held):
    method, other = SFTTraining(held()), SFTTraining(held(seed=5))
    assert len(method.held_out) == 12
    assert method.held_out.tolist() == other.held_out.tolist()
    trained = set(chain.from_iterable(p.rows for i in range(18) for p in method.batch(i).micro_batches))
    assert trained == set(range(48)) - set(method.held_out.tolist())  # two epochs of 36 rows in batches of 4
    validated = [p.rows for batch in method.validation_batches() for p in batch.micro_batches]
    assert set(chain.from_iterable(validated)) <= set(method.held_out.tolist())
    assert sum(map(len, validated)) == 12  # two draws of six rows


def test_a_share_of_nothing_changes_nothing(changed):
    method = SFTTraining(changed(sections={"sft": FROZEN}))
    assert [p.rows for p in method.batch(2).micro_batches] == [
        p.rows for p in SFTTraining(method.config).batch(2).micro_batches
    ]
    assert sorted(chain.from_iterable(p.rows for p in method.batch(2).micro_batches)) == sorted(
        method.order[2].tolist()
    )
    assert len(method.held_out) == 0


def test_losses_are_recorded_at_fixed_noise_and_resume_gives_the_same(held, metrics, broken_off, tmp_path):
    whole = train(held(), SFTTraining(held()))
    records = [r for r in metrics(whole.parent) if "validation/loss" in r]
    assert [r["step"] for r in records] == [0, 2, 4]
    report = json.loads((whole.parent / "data.json").read_text())
    assert (report["rows"], report["validation_rows"], report["rows_per_epoch"]) == (48, 12, 36)
    broken = replace(held(), output=str(tmp_path / "broken"))
    broken_off(broken, SFTTraining, after=3)
    assert metrics(broken.output) == metrics(whole.parent)
    still = replace(held(), output=str(tmp_path / "still"), optimizer=replace(held().optimizer, lr=0.0, muon_lr=0.0))
    train(still, SFTTraining(still))
    losses = [r["validation/loss"] for r in metrics(still.output) if "validation/loss" in r]
    assert losses == [losses[0]] * 3  # nothing but the student can change it
    assert losses[0] == records[0]["validation/loss"] != records[1]["validation/loss"]


def test_the_loss_is_the_same_over_any_number_of_processes(held):
    method, total = SFTTraining(held()), []
    for processes in (1, 3):
        values = []
        for process in range(processes):
            method.place(torch.device("cpu"), Share(process, processes))
            for batch in method.validation_batches():
                for piece in batch.micro_batches:
                    with torch.no_grad():
                        losses = method.loss("student", piece)[0]
                    if piece.counts:
                        values += [(r, batch.index, float(x)) for r, x in zip(piece.rows, losses, strict=True)]
        total.append(sorted(values))
    for (row, index, one), (same_row, same_index, other) in zip(*total, strict=True):
        assert (row, index) == (same_row, same_index)
        assert one == pytest.approx(other, abs=1e-6)


def test_previews_are_of_held_out_rows(held):
    method = SFTTraining(held())
    assert not method.grid_is_cached
    seen = []
    sample = method.sample
    method.sample = lambda role, batch, seed: seen.append(batch.x0.clone()) or sample(role, batch, seed)
    grid = method.preview()
    assert len(seen) == 2
    chosen = evenly_spaced(method.held_out, 2)
    for x0, row in zip(seen, chosen.tolist(), strict=True):
        assert torch.equal(x0, method.micro_batch(method.samples, [row], 0).x0)
    assert grid.height > 3 * 128


def test_a_set_of_its_own_is_cached_and_validated(changed, tmp_path, capsys):
    own = {"folder": str(tmp_path / "held"), "seed": 9, **SMALL}
    config = changed(sections={"sft": FROZEN, "validation": {"data": own, "every": 3}}, steps=3)
    (tmp_path / "config.yaml").write_text(json.dumps(to_dict(config)))
    with pytest.raises(ConfigError, match="there is no cache in .*held; run python -m trainers.cache"):
        SFTTraining(config)
    assert main([str(tmp_path / "config.yaml")]) == 0, capsys.readouterr().err
    method = SFTTraining(config)
    assert len(method.train_rows) == 48
    assert len(Samples(cached_samples(config.validation.data, method.encoder))) == len(method.held_out) == 6
    report = method.data_report()
    assert (report["rows"], report["validation_rows"]) == (54, 6)
    targets = {p.x0.shape[1] for batch in method.validation_batches() for p in batch.micro_batches}
    assert targets == {16}  # its own pictures are of 64 pixels


def test_a_missing_preview_is_an_error_before_training(changed):
    with pytest.raises(ConfigError, match="samples of this preview grid are not in"):
        SFTTraining(changed(sections={"sft": FROZEN, "preview": {"samples": 5}}))


def test_held_out_rows_stay_when_rows_are_added():
    class Many(Samples):
        def __init__(self, count):
            self.digests = digests_of(("64x64", f"row {i % 40}") for i in range(count))

        def __len__(self):
            return len(self.digests)

    before, after = (set(held_out_rows(Many(n), 0.1).tolist()) for n in (1000, 1100))
    assert (len(before), len(after)) == (100, 110)
    assert len(before & after) >= 85
    assert len(held_out_rows(Many(20), 0.001)) == 1


@pytest.mark.parametrize(
    ("validation", "data", "message"),
    [
        ({"share": 0.7}, {}, r"validation\.share must be from 0 to 0\.5, got 0\.7"),
        ({"share": 0.1, "data": {"folder": "other"}}, {}, "either share or data, got both"),
        ({"data": {"seed": 3}}, {}, "must be another folder than data.folder"),
        ({"every": 0}, {}, r"validation\.every must be at least 1"),
    ],
)
def test_wrong_sections(changed, validation, data, message):
    with pytest.raises(ConfigError, match=message):
        changed(sections={"sft": FROZEN, "validation": validation, "data": data})


def test_endless_scenes_hold_nothing_out(changed):
    data = {"kind": "scenes", "folder": "", "samples": 0}
    with pytest.raises(ConfigError, match="got data.kind scenes, which is endless"):
        changed(sections={"validation": {"share": 0.1}, "data": data})
