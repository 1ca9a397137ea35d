"""Configs are strict: what no trainer understands is an error that names it."""

import pytest

from tests.paths import CONFIGS
from trainers.config.run import AdapterConfig, ConfigError, ScenesConfig, load_config, parse_run, to_dict

REQUIRED = {"network": {"model": "m"}, "data": {"folder": "f", "samples": 1024}}
FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    config = load_config(path)
    for one in config.stages or (config,):  # checkpoints store the config of their stage
        assert parse_run(to_dict(one)) == one


SCENES = {"kind": "scenes", "folder": "", "samples": 0, "path": None}
OWN = {"images": ["a.png"], "prompt": "Go."}
JSONL = {"kind": "jsonl", "path": "b.jsonl", "folder": "b"}
SEVERAL = {"kind": "nano", "folder": "", "samples": 0, "path": None, "sources": [{**JSONL, "folder": "a"}, JSONL]}


def test_held_out_sources_take_the_sizes_of_the_data():
    held_out = {"sources": [{**JSONL, "folder": "c"}, {**JSONL, "folder": "d"}]}
    data = {"folder": "a", "samples": 0, "kind": "jsonl", "path": "a.jsonl", "size": 96, "reference_budget": 64}
    run = {"method": "sft", "output": "x", "network": {"model": "m"}, "data": data, "validation": {"data": held_out}}
    parts = parse_run(run).validation.data.parts
    assert [(part.folder, part.size, part.reference_budget) for part in parts] == [("c", 96, 64), ("d", 96, 64)]


def test_endless_scenes_need_no_section():
    run = {"method": "sft", "output": "x", "network": {"model": "m"}, "data": {"kind": "scenes"}}
    assert parse_run(run).data.scenes == ScenesConfig()


def test_overrides():
    config = load_config(FILES[-1], ["steps=70", "optimizer.lr=1e-3"])
    assert (config.steps, config.optimizer.lr) == (70, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'"),
        ({"steps": "many"}, r"config\.steps must be int"),
        ({"optimizer": {"lr": [1]}}, r"config\.optimizer\.lr must be float"),
        ({"optimizer": {"rate": 1}}, "unknown key 'rate'"),
        ({"vae": {"crop": True}}, r"vae\.crop must be int"),
        ({"method": "sgd"}, "method must be one of"),
        ({"method": ["a"]}, r"method must be one of .*, got \['a'\]"),
        ({"seed": -1}, r"seed must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 10**40}, "seed must be from 0"),
        ({"optimizer": "prodigy"}, r"optimizer must be a section of keys and values, got 'prodigy'"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer\.betas must be a list of 2 values, got \[0\.9\]"),
        ({"stepz": {str(i): "x" * 100 for i in range(100)}}, r"^.{0,700}$"),
        ({"output": None}, r"config\.output must be str"),
        ({"steps": -5}, "steps must be at least 1, got -5"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"precision": "fp16"}, "precision must be one of no, bf16"),
        ({"vae": {"crop": 200}}, "crop must be a multiple of 8"),
        ({"export": ["lora"]}, "export is for methods that train the network"),
        ({"vae": None}, "section vae must hold keys"),
        ({"dmd": {}}, "the section dmd is not for method vae, which has vae"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_run({"method": "vae", "output": "x", **change})


def test_an_override_into_a_value_is_an_error():
    with pytest.raises(ConfigError, match="is a value, not a section"):
        load_config(FILES[0], ["output.x=1"])


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="network needs model"):
        parse_run({"method": "sft", "output": "x"})


def test_unreadable_file(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match="cannot read .*yaml"):
            load_config(tmp_path / name)


def test_a_section_keeps_its_method_s_defaults_of_the_keys_that_it_is_not_given():
    def parsed(method, options):
        return getattr(parse_run({"method": method, "output": "x", **REQUIRED, method: options}), method)

    assert parsed("dmd", {"optimizer": {"kind": "adamw8bit"}}).optimizer.lr == 4e-7
    times = parsed("dmd", {"times": {"mean": 0.3}}).times
    assert (times.mean, times.std, times.least, times.most) == (0.3, 1.0, 0.02, 0.98)
    times = parsed("consistency", {"times": {"std": 1}}).times
    assert (times.mean, times.std) == (-0.5, 1.0)


def test_targets_are_groups_of_layers_or_ends_of_names():
    assert AdapterConfig(targets=("modulation", "to_q")).layers == ("img_mod.1", "txt_mod.1", "to_q")


@pytest.mark.parametrize("word", ["no", "'no'", "off"])
def test_precision_no_needs_no_quotes(tmp_path, word):
    (tmp_path / "a.yaml").write_text(f"method: vae\noutput: x\nprecision: {word}\n")
    assert load_config(tmp_path / "a.yaml").precision == "no"


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("sft", {"network": {"weights": "nf4"}}, "need a frozen base; add an adapter section"),
        ("sft", {"network": {"block_swap": 2}}, "need a frozen base"),
        ("sft", {"network": {"adapter": {}, "shard": True, "gather": "fp32"}}, "gather is for trained networks"),
        ("sft", {"network": {"shard": True}, "optimizer": {"muon_lr": 0.01}}, "muon_lr needs whole matrices"),
        ("sft", {"network": {"shard": True}, "sft": {"train_text_encoder": True}}, "trains a whole encoder beside"),
        ("sft", {"data": SCENES | {"alternate": "tasks"}}, "data.alternate is for cached rows, got 'tasks'"),
        ("sft", {"data": SCENES | {"samples": 10}}, "data.samples is for cached rows, got 10 with kind scenes"),
        ("sft", {"data": SCENES | {"text_storage": "fp8"}}, "data.text_storage fp8 is for cached rows"),
        ("dmd", {"network": {"shard": True}, "dmd": {"optimizer": {"muon_lr": 0.01}}}, "muon_lr needs whole matrices"),
        ("sft", {"network": {"shard": True}, "optimizer": {"kind": "adamw8bit"}}, "adamw8bit does not support tensors"),
        ("sft", {"network": {"shard": True}, "optimizer": {"kind": "adafactor"}}, "adafactor does not support tensors"),
        ("sft", {"optimizer": {"kind": "prodigy"}}, "lr must be near 1 for prodigy, .* got 0.0001"),
        ("sft", {"optimizer": {"kind": "prodigy", "lr": 1, "muon_lr": 1}}, "muon_lr cannot be used with kind prodigy"),
        ("sft", {"optimizer": {"kind": "adafactor", "betas": [0.5, 0.9]}}, "betas and eps are not used by adafactor"),
        ("sft", {"optimizer": {"kind": "schedule_free"}}, "ema_decay must be 0 with schedule_free"),
        ("sft", {"optimizer": {"kind": "schedule_free", "final_lr_ratio": 0.1}}, "final_lr_ratio is not used by"),
        ("dmd", {"dmd": {"optimizer": {"kind": "schedule_free"}}}, "schedule_free trains at other weights"),
        ("sft", {"network": {"adapter": {"dropout": 1.0}}}, r"dropout must be from 0 to below 1"),
        ("sft", {"data": {"kind": "jsonl"}}, r"data\.path is needed"),
        ("sft", {"data": {"samples": 1000}}, "must be a multiple of samples_per_shard"),
        ("sft", {"sft": {"times": {"least": 0.9, "most": 0.2}}}, "0 <= least < most <= 1"),
        ("consistency", {"consistency": {"e": 0.0}}, "e must be above 0"),
        ("consistency", {"consistency": {"guidance_from": "ema"}}, "needs velocity data"),
        ("consistency", {"consistency": {"normalisation": "l2"}}, "normalisation must be one of"),
        ("dmd", {"dmd": {"weighting": "second"}}, "weighting must be one of"),
        ("dmd", {"dmd": {"fake_updates": 0}}, "fake_updates must be at least 1"),
        ("dmd", {"consistency": {}}, "the section consistency is not for method dmd"),
        (
            "dmd",
            {"optimizer": {"kind": "sgd"}},
            "kind must be one of adamw, adamw8bit, adafactor, prodigy",
        ),
        (
            "dmd",
            {"dmd": {"fake_warmup_steps": 1000}},
            "must be below steps, or .*, got 1000 of 1000",
        ),
        ("joint", {"dmd": {"fake_warmup_steps": 2000}}, "must be below steps"),
        ("joint", {"joint": {"dmd_weight": -1}}, "dmd_weight must be at least 0"),
        ("sft", {"optimizer": {"lr": -1}}, "lr must be at least 0, got -1"),
        ("sft", {"optimizer": {"lr": "nan"}}, "lr must be at least 0, got nan"),
        ("sft", {"optimizer": {"max_grad_norm": -1}}, "max_grad_norm must be at least 0"),
        ("sft", {"optimizer": {"eps": 0}}, "eps must be above 0"),
        ("sft", {"optimizer": {"betas": [0.9, 1]}}, "betas must be from 0 to below 1"),
        ("sft", {"optimizer": {"final_lr_ratio": 2}}, "final_lr_ratio must be from 0 to 1"),
        ("sft", {"ema_decay": 3}, "ema_decay must be from 0 to 1, got 3"),
        ("sft", {"sft": {"prompt_dropout": 7}}, "prompt_dropout must be from 0 to 1, got 7"),
        ("sft", {"sft": {"times": {"std": -1}}}, "std must be at least 0"),
        ("sft", {"network": {"adapter": {"alpha": 0}}}, "alpha must be above 0, got 0"),
        ("sft", {"preview": {"steps": 0}}, "steps must be at least 1, got 0"),
        ("sft", {"preview": {"guidance": -1}}, "guidance must be at least 0"),
        ("sft", {"export": ["onnx"]}, "export must be of lora, merged, folder, raw, got 'onnx'"),
        ("sft", {"export": "lora"}, "export must be a list of values"),
        ("sft", {"export": ["lora", "raw"]}, r"export must name one of merged, folder for this run, got \['lora'"),
        ("sft", {"export": ["merged"], "sft": {"train_text_encoder": True}}, "must name folder, which holds the text"),
        ("consistency", {"consistency": {"prompt_dropout": -0.1}}, "prompt_dropout must be from 0 to 1"),
        ("sft", {"data": SCENES, "max_tokens": 4000}, "max_tokens is for cached rows, got data.kind scenes"),
        ("sft", {"data": SCENES, "preview": {"own": [OWN]}}, "preview.own needs cached rows, got data.kind scenes"),
        (
            "sft",
            {"data": SEVERAL, "validation": {"data": {**JSONL, "folder": "a"}}},
            "another folder .*, got a for both",
        ),
        ("sft", {"data": SEVERAL, "validation": {"data": {"sources": [JSONL]}}}, "another folder .*, got b for both"),
    ],
)
def test_wrong_network_configs(method, change, message):
    sections = {name: {**kept, **change.get(name, {})} for name, kept in REQUIRED.items()}
    with pytest.raises(ConfigError, match=message):
        parse_run({"method": method, "output": "x", **change, **sections})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.adapter.targets=attention", r"network\.adapter\.targets must be a list of values.*, got 'attention'"),
        ("data.size=130", r"data\.size must be a multiple of 32 pixels, got 130"),
        ("network.adapter.rank=0", r"network\.adapter\.rank must be at least 1, got 0"),
        ("data.seed=-3", r"data\.seed must be from 0"),
        ("steps=[1", r"steps: expected a YAML value in the override 'steps=\[1'"),
        ("steps=" + "[" * 3000, "nested more than 16 levels"),
        ("seed=" + "9" * 5000, "seed: expected a YAML value"),
    ],
    ids=lambda value: value[:24],
)
def test_wrong_overrides_are_one_line(override, message):
    config = CONFIGS / "unipic3-consistency-80gb.yaml"
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(config, [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 2 has a YAML alias"),
        ("a: &a\n  b: *a\n", "YAML alias"),
        ("{a: " * 5000, "nested more than 16 levels"),
        ("x" * (2**20 + 1), "at most 1048576 are read"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable key"),
        ("steps: 2024-13-45", "month must be in"),
        ("steps: 1\nsteps: 2", "line 2: the key 'steps' occurs twice"),
    ],
    ids=["bomb", "recursive", "deep", "long", "code", "key", "date", "twice"],
)
def test_hostile_files_are_one_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
