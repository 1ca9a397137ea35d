"""Several processes, through the command line that users start: gradients added up, or networks spread (FSDP2)."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainers.processes import launch
from trainers.config.run import to_dict
from trainers.train import make_method, train

FAKE = {"dmd": {"fake_updates": 1, "max_steps": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}}
METHODS = {
    "sft": {"sft": {"train_text_encoder": False}},
    "consistency": {},
    "dmd": FAKE,
    "joint": FAKE,
}
ADAPTER, SHARD = {"adapter": {"rank": 2}}, {"shard": True}


def written(config, path):
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    path.write_text(yaml.safe_dump(plain(to_dict(config))))
    return str(path)


@pytest.mark.parametrize(
    ("method", "network"),
    [*((method, ADAPTER) for method in METHODS), ("sft", SHARD), ("consistency", SHARD), ("dmd", SHARD)],
    ids=[*(f"{method}-adapters" for method in METHODS), "sft-sharded", "consistency-sharded", "dmd-sharded"],
)
def test_two_processes_train_as_one(changed, tmp_path, metrics, method, network):
    values = {"steps": 2, "save_every": 1, "sample_every": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    alone = {} if network is SHARD else network
    config = changed(method, {**METHODS[method], "network": alone}, output=str(tmp_path / "one"), **values)
    one = train(config, make_method(config))
    config = changed(method, {**METHODS[method], "network": network}, output=str(tmp_path / "two"), **values)
    launch(2, "-m", "trainers.train", written(config, tmp_path / "run.yaml"))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["grad_norm"] > 0
    name = f"unipic_{'sft' if method == 'sft' else 'distill'}.safetensors"
    wanted, got = load_file(one / name), load_file(tmp_path / "two" / "export" / name)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert (tensor.float() - got[name].float()).abs().max() < 2e-2 * tensor.float().abs().max() + 1e-4, name

    if network is SHARD:  # it goes on from its own checkpoint
        before = metrics(tmp_path / "two")
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-0000002")
        launch(2, "-m", "trainers.train", str(tmp_path / "run.yaml"))
        assert metrics(tmp_path / "two") == before


def sharded_run(changed, output, **values):
    rates = {"lr": 1e-3, "warmup_steps": 1, "final_lr_ratio": 1.0}  # the same whatever the number of steps
    options = {"save_every": 2, "sample_every": 100, "optimizer": rates, "output": str(output), **values}
    return changed("sft", {**METHODS["sft"], "network": SHARD}, **options)


def test_a_sharded_run_goes_on_in_another_number_of_processes(changed, tmp_path, metrics):
    """Two steps each in 2, 4 and 1 processes, against six in one process that was never stopped."""
    whole = sharded_run(changed, tmp_path / "whole", steps=6)
    one = train(whole, make_method(whole))
    for steps, processes in ((2, 2), (4, 4), (6, 1)):
        path = written(sharded_run(changed, tmp_path / "moves", steps=steps), tmp_path / f"{steps}.yaml")
        allow = [] if steps == 2 else ["--allow-config-change", "steps"]
        launch(processes, "-m", "trainers.train", path, *allow)
    run = tmp_path / "moves"
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    losses = [row["loss"] for row in metrics(tmp_path / "whole")]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=0, abs=1e-5)
    wanted, got = (load_file(folder / "unipic_sft.safetensors") for folder in (one, run / "export"))
    for name, tensor in wanted.items():
        assert (tensor.float() - got[name].float()).abs().max() < 2e-2 * tensor.float().abs().max() + 1e-4, name


def test_one_process_alone_spreads_nothing(changed, tmp_path, metrics):
    """Its checkpoints are those of sharded runs, and a damaged one is noticed."""
    config = sharded_run(changed, tmp_path / "moves", steps=4)
    train(config, make_method(config))
    before = metrics(config.output)
    newest = tmp_path / "moves" / "checkpoints" / "step-0000004" / "shards"
    for path in newest.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    train(config, make_method(config))  # from step 2
    assert metrics(config.output) == before


def test_networks_are_filled_one_tensor_at_a_time(changed, tmp_path, monkeypatch):
    """Nothing is read before the network is sharded, and then each parameter once."""
    from unipic_core.weights.files import Weights

    read = []
    real = Weights.get
    monkeypatch.setattr(Weights, "get", lambda self, name, **how: read.append(name) or real(self, name, **how))
    config = sharded_run(changed, tmp_path / "moves", steps=1)
    method = make_method(config)
    student = method.roles.network("student")
    assert all(p.is_meta for p in student.parameters())
    read.clear()
    method.roles.place(torch.device("cpu"))
    names = [name for name, _ in student.named_parameters()]
    assert sorted(read) == sorted(names * 2)  # the student and its average
