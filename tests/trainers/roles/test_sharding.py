"""Several processes, through the command line that users start: gradients added up, or networks spread (FSDP2)."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.trainers.processes import fork, launch
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
SHARDED_BASE = {**ADAPTER, **SHARD, "weights": "fp8", "gradient_checkpointing": True}


def written(config, path):
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    path.write_text(yaml.safe_dump(plain(to_dict(config))))
    return str(path)


@pytest.mark.parametrize(
    ("method", "network"),
    [
        *((method, ADAPTER) for method in METHODS),
        *((method, SHARD) for method in ("sft", "consistency", "dmd")),
        *((method, SHARDED_BASE) for method in ("consistency", "joint")),
    ],
    ids=[
        *(f"{method}-adapters" for method in METHODS),
        *("sft-sharded", "consistency-sharded", "dmd-sharded", "consistency-sharded-base", "joint-sharded-base"),
    ],
)
def test_two_processes_train_as_one(changed, tmp_path, metrics, method, network):
    values = {"steps": 2, "save_every": 1, "sample_every": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    alone = {key: value for key, value in network.items() if key != "shard"}
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

    if "shard" in network:  # it goes on from its own checkpoint
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
        go_on(sharded_run(changed, tmp_path / "moves", steps=steps), processes, ["steps"])
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


# --- gathers in bfloat16, groups of processes, sharded bases ----------------------------------------------------------


SHORT = {"steps": 2, "save_every": 2, "sample_every": 100, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}


def losses_of(metrics, output):
    return [row["loss"] for row in metrics(output)]


def run_of(changed, output, network, method="sft", **values):
    rates = {"lr": 1e-3, "warmup_steps": 1, "final_lr_ratio": 1.0}
    options = {"save_every": 2, "sample_every": 100, "optimizer": rates, "output": str(output), "steps": 2, **values}
    return changed(method, {**METHODS[method], "network": network}, **options)


def go_on(config, processes, changes=()):
    """Start or resume in so many processes. changes: keys that may have changed."""
    fork(processes, lambda: train(config, make_method(config), changes))


GATHER_TOLERANCE = 2e-3
"""Relative difference of losses: bfloat16 gathers round the norms' weights, and those of the float32 tangent, by 2^-9
more than autocast does, which rounds all others itself."""


@pytest.mark.parametrize("method", ["sft", "consistency"])
def test_gathers_in_bfloat16(changed, tmp_path, metrics, method):
    """Against float32 gathers in two processes and one process that spreads nothing, all under autocast."""
    for name, processes, network in (
        ("alone", 1, {}),
        ("fp32", 2, {**SHARD, "gather": "fp32"}),
        ("bf16", 2, {**SHARD, "gather": "bf16"}),
    ):
        config = run_of(changed, tmp_path / name, network, method, precision="bf16")
        go_on(config, processes)
    expected, exact, rounded = (losses_of(metrics, tmp_path / name) for name in ("alone", "fp32", "bf16"))
    assert exact == pytest.approx(expected, rel=1e-4)
    assert rounded == pytest.approx(expected, rel=GATHER_TOLERANCE)
    assert rounded != exact, "the gathers were in another dtype"
    for a, b in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "bf16"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)
    state = FileSystemReader(tmp_path / "bf16" / "checkpoints" / "step-0000002" / "shards").read_metadata()
    dtypes = {entry.properties.dtype for entry in state.state_dict_metadata.values() if len(entry.size) > 1}
    assert dtypes == {torch.float32}, "master weights, average and optimizer states"


@pytest.mark.parametrize("network", [SHARD, SHARDED_BASE], ids=["trained", "base"])
def test_groups_of_processes_hold_a_copy_each(changed, tmp_path, metrics, network):
    """Two copies over two processes each, as two machines of two cards; then on in groups of other numbers."""
    alone = {key: value for key, value in network.items() if key != "shard"}
    whole = run_of(changed, tmp_path / "whole", alone, steps=6)
    train(whole, make_method(whole))
    for steps, processes, over in ((2, 4, 2), (4, 2, 0), (6, 1, 0)):
        config = run_of(changed, tmp_path / "moves", {**network, "shard_over": over}, steps=steps)
        go_on(config, processes, ["steps"])
    assert losses_of(metrics, tmp_path / "moves") == pytest.approx(losses_of(metrics, tmp_path / "whole"), abs=1e-5)


def test_the_exact_tangent_goes_through_sharded_networks(changed, tmp_path, metrics):
    tangent = {"consistency": {"tangent": "jvp"}}
    for name, processes, network in (("one", 1, {}), ("two", 2, SHARD)):
        network = {**network, "attention": "matmul"}
        config = changed("consistency", {"network": network, **tangent}, output=str(tmp_path / name), **SHORT)
        go_on(config, processes)
    assert losses_of(metrics, tmp_path / "two") == pytest.approx(losses_of(metrics, tmp_path / "one"), abs=1e-5)


def test_groups_that_do_not_divide_the_processes_are_refused(changed, tmp_path):
    config = run_of(changed, tmp_path / "run", {**SHARD, "shard_over": 2})
    with pytest.raises(AssertionError, match=r"expected a divisor of the number of processes, 3, got 2"):
        go_on(config, 3)


def test_a_sharded_base_goes_on_in_another_number_of_processes(changed, tmp_path, metrics):
    """Steps in 2, 4 and 1 processes; the exported LoRA is that of one process that was never stopped."""
    network = {**SHARDED_BASE, "weights": "bf16"}
    whole = run_of(changed, tmp_path / "whole", {k: v for k, v in network.items() if k != "shard"}, steps=6)
    one = train(whole, make_method(whole))
    for steps, processes in ((2, 2), (4, 4), (6, 1)):
        config = run_of(changed, tmp_path / "moves", network, steps=steps)
        go_on(config, processes, ["steps"])
    assert losses_of(metrics, tmp_path / "moves") == pytest.approx(losses_of(metrics, tmp_path / "whole"), abs=1e-5)
    (saved,) = (tmp_path / "moves" / "checkpoints" / "step-0000006").glob("*.safetensors")
    for mine in (tmp_path / "moves" / "export" / "unipic_sft.safetensors", saved):
        for name, tensor in load_file(one / "unipic_sft.safetensors").items():
            assert (
                tensor.float() - load_file(mine)[name].float()
            ).abs().max() < 2e-2 * tensor.float().abs().max() + 1e-4


def test_a_frozen_base_is_filled_layer_by_layer(changed, tmp_path):
    """On the meta device until it is placed; in one process the very bits of a base that is not sharded."""
    network = {**SHARDED_BASE, "weights": "fp8"}
    sharded = make_method(run_of(changed, tmp_path / "a", network)).roles
    assert all(p.is_meta for name, p in sharded.network.named_parameters() if "lora" not in name)
    assert not any(p.is_meta for _, p in sharded.parameters_of("student"))
    whole = make_method(run_of(changed, tmp_path / "b", {k: v for k, v in network.items() if k != "shard"})).roles
    for roles in (sharded, whole):
        roles.place(torch.device("cpu"))
    expected = {**dict(whole.network.named_parameters()), **dict(whole.network.named_buffers())}
    found = {**dict(sharded.network.named_parameters()), **dict(sharded.network.named_buffers())}
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.detach().float(), found[name].detach().float()), name


@pytest.mark.parametrize(
    ("network", "values", "message"),
    [
        ({"shard_over": 2}, {}, "shard_over is for sharded networks, got 2; set shard to true"),
        ({"gather": "bf16"}, {}, "gather is for sharded networks"),
        ({**SHARD, "shard_over": 1}, {}, "shard_over must be at least 2, or 0"),
        ({**SHARD, "gather": "bf16"}, {}, "gather bf16 needs precision bf16, got precision no"),
        ({**SHARD, **ADAPTER, "gather": "fp32"}, {}, "gather is for trained networks"),
        ({**SHARD, **ADAPTER, "block_swap": 2}, {}, "block_swap cannot be used with shard"),
    ],
)
def test_keys_of_sharding_that_would_do_nothing_are_refused(changed, tmp_path, network, values, message):
    with pytest.raises(ConfigError, match=message):
        run_of(changed, tmp_path, network, **values)
