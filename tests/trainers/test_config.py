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
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_run({"method": "vae", "output": "x", **change})


def test_an_override_into_a_value_is_an_error():
    with pytest.raises(ConfigError, match="is a value, not a section"):
        load_config(CONFIGS[0], ["output.x=1"])


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="sft needs model, data"):
        parse_run({"method": "sft", "output": "x"})


def test_unreadable_file(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match="cannot read the config"):
            load_config(tmp_path / name)
