"""Configs are strict: what no trainer understands is an error that names it."""

from pathlib import Path

import pytest

from trainers.config import ConfigError, load_config, parse_run, to_dict

CONFIGS = sorted((Path(__file__).parents[2] / "trainers" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    config = load_config(path)
    assert parse_run(to_dict(config)) == config


def test_overrides():
    config = load_config(CONFIGS[-1], ["steps=7", "optimizer.lr=1e-3"])
    assert (config.steps, config.optimizer.lr) == (7, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'"),
        ({"steps": "many"}, r"config\.steps must be int"),
        ({"optimizer": {"lr": [1]}}, r"config\.optimizer\.lr must be float"),
        ({"optimizer": {"rate": 1}}, "unknown key 'rate'"),
        ({"vae": {"crop": True}}, r"vae\.crop must be int"),
        ({"method": "sgd"}, "method must be one of"),
        ({"output": None}, r"config\.output must be str"),
        ({"steps": -5}, "steps must be at least 1, got -5"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"precision": "fp16"}, "precision must be one of no, bf16"),
        ({"vae": {"crop": 200}}, "crop must be a multiple of 8"),
        ({"vae": None}, "section vae must hold keys"),
        ({"dmd": {}}, "the section dmd is not for method vae, which has vae"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_run({"method": "vae", "output": "x", **change})


def test_an_override_into_a_value_is_an_error():
    with pytest.raises(ConfigError, match="is a value, not a section"):
        load_config(CONFIGS[0], ["output.x=1"])


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="network needs model"):
        parse_run({"method": "sft", "output": "x"})


def test_unreadable_file(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match="cannot read the config"):
            load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("sft", {"network": {"weights": "nf4"}}, "need a frozen base: add an adapter section"),
        ("sft", {"network": {"block_swap": 2}}, "need a frozen base"),
        ("sft", {"network": {"adapter": {}, "shard": True}}, "shard is for full-parameter training"),
        ("sft", {"network": {"shard": True}, "optimizer": {"muon_lr": 0.01}}, "muon_lr needs whole matrices"),
        ("sft", {"network": {"adapter": {"dropout": 1.0}}}, r"dropout must be from 0 to below 1"),
        ("sft", {"data": {"kind": "jsonl"}}, r"data\.path is needed"),
        ("sft", {"data": {"samples": 1000}}, "must be a multiple of samples_per_shard"),
        ("sft", {"sft": {"times": {"least": 0.9, "most": 0.2}}}, "0 <= least < most <= 1"),
        ("consistency", {"consistency": {"e": 0.0}}, "e must be above 0"),
        ("consistency", {"consistency": {"guidance_from": "ema"}}, "goes with velocity data"),
        ("consistency", {"consistency": {"normalisation": "l2"}}, "normalisation must be one of"),
        ("dmd", {"dmd": {"weighting": "second"}}, "weighting must be one of"),
        ("dmd", {"dmd": {"fake_updates": 0}}, "fake_updates must be at least 1"),
        ("dmd", {"consistency": {}}, "the section consistency is not for method dmd"),
        ("dmd", {"optimizer": {"kind": "sgd"}}, "kind must be one of adamw, adamw8bit"),
    ],
)
def test_wrong_network_configs(method, change, message):
    good = {"network": {"model": "m"}, "data": {"folder": "f", "samples": 1024}}
    sections = {name: {**good.get(name, {}), **change.get(name, {})} for name in {**good, **change}}
    with pytest.raises(ConfigError, match=message):
        parse_run({"method": method, "output": "x", **sections})
