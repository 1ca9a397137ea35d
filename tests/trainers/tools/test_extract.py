"""A LoRA of the difference of two checkpoints: the nearest of its rank, and as good as the training where that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.paths import TINY
from trainers.config.run import AdapterConfig, NetworkConfig
from trainers.loop.export import export_network
from trainers.roles.load import load_roles
from trainers.tools.extract import best_of_rank, extract, main
from unipic_core.weights.lora import merge_lora, read_lora
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import load_transformer, read_config

RANK = 3
FORM = "prefix_causal"


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY after a training that moved every layer of the blocks by a matrix of rank 3, and a bias."""
    folder = tmp_path_factory.mktemp("tuned")
    state = load_transformer(TINY).state_dict()
    for i, (name, w) in enumerate(state.items()):
        if w.ndim == 2 and name.startswith("transformer_blocks.") and name[:-7].endswith(AdapterConfig().layers):
            state[name] = w + 0.1 * draw(w.shape[0], RANK, seed=i) @ draw(RANK, w.shape[1], seed=i + 1000)
    state["proj_out.bias"] = state["proj_out.bias"] + 0.01
    recipe = Recipe(steps=2, attention_form=FORM, made={"method": "sft"})
    export_network(folder, TINY, state, read_config(TINY), recipe, "tuned")
    return folder / "tuned"


@pytest.mark.parametrize("size", [(12, 7), (7, 12), (9, 9)])
def test_no_matrix_of_that_rank_is_nearer(size: tuple[int, int]) -> None:
    difference = draw(*size)
    down, up = best_of_rank(difference, RANK)
    assert (down.shape, up.shape) == ((RANK, size[1]), (size[0], RANK))
    torch.testing.assert_close(down @ down.T, torch.eye(RANK))
    left = torch.linalg.svdvals(difference)[RANK:].square().sum()
    torch.testing.assert_close((difference - up @ down).square().sum(), left)


def test_a_training_of_low_rank_is_found_whole(tuned: Path) -> None:
    found = extract(TINY, tuned, RANK)
    before, after = load_transformer(TINY, dtype=torch.float32), load_transformer(tuned, dtype=torch.float32)
    for name, (down, up) in found.layers.items():
        change = after.get_submodule(name).weight - before.get_submodule(name).weight
        assert (change - up @ down).norm() < 2e-2 * change.norm()  # the tuned one is stored in bf16
    assert set(found.layers) == {
        n for n, _ in before.named_modules() if n.startswith("trans") and n.endswith(AdapterConfig().layers)
    }
    assert 0.999 < found.share < found.share_in_layers < 1
    assert extract(TINY, tuned, 1).share < 0.8


def test_the_file_gives_the_tuned_network_and_its_form(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "lora.safetensors"
    assert main([str(TINY), str(tuned), "--rank", "3", "--out", str(file)]) == 0
    assert "rank 3" in capsys.readouterr().out
    lora = read_lora(file)
    assert (lora.recipe.attention_form, lora.recipe.steps) == (FORM, 2)
    assert lora.recipe.made["extract"]["rank"] == 3
    changed, wanted = load_transformer(TINY, dtype=torch.float32), load_transformer(tuned, dtype=torch.float32)
    merge_lora(changed, lora)
    for name, weight in wanted.state_dict().items():
        if weight.ndim > 1:
            assert (changed.state_dict()[name] - weight).norm() < 1e-2 * weight.norm(), name


def test_training_goes_on_from_it_in_its_form(tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    assert main([str(TINY), str(tuned), "--rank", "3", "--out", str(file)]) == 0
    config = NetworkConfig(str(TINY), student=str(file), adapter=AdapterConfig(rank=3, alpha=6.0))
    roles = load_roles(config, ("student",), ("teacher",), seed=0)
    assert (roles.config_of("student").attention_form, roles.config_of("teacher").attention_form) == (FORM, "full")
    parts = roles.adapter("student")["transformer_blocks.0.attn.to_q"].parts
    down, up = parts["down"], parts["up"]
    there = extract(TINY, tuned, RANK).layers["transformer_blocks.0.attn.to_q"]
    wanted = there[1] @ there[0]
    assert (2 * up @ down - wanted).norm() < 1e-2 * wanted.norm()  # alpha / rank is 2; the file is bf16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "3", "--out", "a.bin"], "must end in .safetensors"),
        (["--rank", "0"], "at least 1"),
        (["--rank", "4096"], "at most the width of every layer"),
        (["--target", "to_nothing"], "got to_nothing"),
        (["--same"], "equal weights"),
        (["--missing"], "no/such"),
    ],
)
def test_mistakes_are_one_sentence(
    options: list[str], words: str, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    second = {"--same": str(TINY), "--missing": "no/such"}.get(options[0], str(tuned))
    given = [option for option in options if option not in ("--same", "--missing")]
    out = [] if "--out" in given else ["--out", str(tmp_path / "x.safetensors")]
    rank = [] if "--rank" in given else ["--rank", "2"]
    assert main([str(TINY), second, *given, *rank, *out]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
