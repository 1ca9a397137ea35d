"""Several processes, through the command line that users start: gradients added up, or networks spread (FSDP2)."""

import pytest
import yaml
from processes import launch
from safetensors.torch import load_file

from trainers.config import to_dict
from trainers.sft import SFTTraining
from trainers.train import train

SMALL = {"sft": {"train_text_encoder": False}}


def written(config, path):
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    path.write_text(yaml.safe_dump(plain(to_dict(config))))
    return str(path)


@pytest.mark.parametrize("network", [{"adapter": {"rank": 2}}, {"shard": True}], ids=["adapters", "sharded"])
def test_two_processes_train_as_one(changed, tmp_path, metrics, network):
    values = {"steps": 4, "save_every": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 2}}
    alone = {k: v for k, v in network.items() if k != "shard"}
    config = changed(sections={**SMALL, "network": alone}, output=str(tmp_path / "one"), **values)
    one = train(config, SFTTraining(config))
    config = changed(sections={**SMALL, "network": network}, output=str(tmp_path / "two"), **values)
    launch(2, "-m", "trainers.train", written(config, tmp_path / "run.yaml"))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    found = tmp_path / "two" / "export" / "unipic_sft.safetensors"
    wanted, got = load_file(one / "unipic_sft.safetensors"), load_file(found)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert (tensor.float() - got[name].float()).abs().max() < 2e-2 * tensor.float().abs().max() + 1e-4, name

    # and a sharded run goes on from its own checkpoint
    for extra in (tmp_path / "two" / "checkpoints").glob("step-0000004"):
        for file in sorted(extra.rglob("*"), reverse=True):
            file.unlink()
        extra.rmdir()
    before = metrics(tmp_path / "two")
    launch(2, "-m", "trainers.train", str(tmp_path / "run.yaml"))
    assert metrics(tmp_path / "two") == before
