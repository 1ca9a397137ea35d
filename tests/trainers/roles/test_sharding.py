"""Several processes, through the command line that users start: gradients added up, or networks spread (FSDP2)."""

import shutil

import pytest
import yaml
from safetensors.torch import load_file

from tests.trainers.processes import launch
from trainers.config.run import ConfigError, to_dict
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


def test_one_process_cannot_spread_networks(changed):
    config = changed(sections={**METHODS["sft"], "network": SHARD}, optimizer={"lr": 1e-3})
    with pytest.raises(
        ConfigError,
        match="several processes, got one; start it with accelerate launch, or set shard: false",
    ):
        train(config, make_method(config))
