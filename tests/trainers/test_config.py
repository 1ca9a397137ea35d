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
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_run({"method": "vae", "output": "x", **change})


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="sft needs model, data"):
        parse_run({"method": "sft", "output": "x"})


def test_unreadable_file(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match="cannot read the config"):
            load_config(tmp_path / name)
