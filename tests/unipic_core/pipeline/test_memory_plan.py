"""Where the parts lie: by arithmetic, and counted on a simulated device at the released sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unipic_core.pipeline.device_bytes import DEVICE, counting, network
from unipic_core.cli import main
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.errors import UniPicError
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_core.pipeline import memory_plan
from unipic_core.pipeline.memory_plan import ROOMS, MemoryPlan, PartSizes, main_memory, plan_memory
from unipic_core.run.memory import WORKING_BYTES
from unipic_core.weights.stored import Storage

CUDA, CPU, GIB = torch.device("cuda"), torch.device("cpu"), 2**30
BF16 = PartSizes(
    network=235_000_000,
    block=679_477_248,
    blocks=60,
    restored=0,
    text_encoder=15_200_000_000,
    vae=101_000_000,
    kv_cache=0,
)
"""About the released parts; tests/unipic_core/weights/test_released_sizes.py has them to the byte."""
FP8 = replace(BF16, block=BF16.block // 2, restored=113_246_208)


def planned(sizes: PartSizes, gib: float, main: int | None = 200 * 10**9) -> MemoryPlan:
    return plan_memory(CUDA, sizes, lambda device: (int(gib * GIB), int(gib * GIB)), lambda: main)


@pytest.mark.parametrize(
    ("sizes", "gib", "turns", "left_behind"),
    [
        (BF16, 79, False, 0),
        (BF16, 47, True, 0),
        (BF16, 39, True, 8),
        (BF16, 31, True, 21),
        (BF16, 23.5, True, 32),
        (FP8, 47, False, 0),
        (FP8, 39, False, 0),
        (FP8, 31, True, 0),
        (FP8, 23.5, True, 0),
        (FP8, 19, True, 16),
    ],
)
def test_cards(sizes: PartSizes, gib: float, turns: bool, left_behind: int) -> None:
    plan = planned(sizes, gib)
    assert plan.turns == turns
    assert abs(plan.left_behind - left_behind) <= 1
    rooms = min(plan.left_behind, ROOMS)
    resident = sizes.network + (sizes.blocks - plan.left_behind + rooms) * sizes.block
    held = resident if turns else resident + sizes.text_encoder + sizes.vae
    assert held + sizes.restored + WORKING_BYTES <= gib * GIB


def test_keys_and_values_count() -> None:
    cached = replace(BF16, kv_cache=6 * GIB)
    assert planned(cached, 47).left_behind > planned(BF16, 47).left_behind == 0


def test_a_card_that_is_too_small_is_one_sentence() -> None:
    with pytest.raises(UniPicError, match=r"the condition encoder needs 17\.3 GB .* has 16\.6 GB free; .*ComfyUI"):
        planned(BF16, 15.5)
    small = replace(BF16, text_encoder=10**9, network=3 * 10**9)
    with pytest.raises(UniPicError, match="the network with two of its blocks needs 8.7 GB"):
        planned(small, 5)


def test_main_memory_is_checked_too() -> None:
    with pytest.raises(UniPicError, match=r'need 56\.3 GB of main memory, this machine has 48\.0 GB.*storage="fp8"'):
        planned(BF16, 31, 48 * 10**9)
    assert planned(FP8, 31, 48 * 10**9).turns
    assert planned(BF16, 79, 10**9) == MemoryPlan(), "what goes straight to the device needs none"
    with pytest.raises(UniPicError, match="of main memory"):
        plan_memory(CPU, BF16, None, lambda: 48 * 10**9)
    assert plan_memory(CPU, BF16, None, lambda: None) == MemoryPlan()


def test_main_memory_of_this_machine(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       100 kB\nMemFree: 3 kB\nSwapTotal:   20 kB\n")
    monkeypatch.setattr(memory_plan, "MEMINFO", tmp_path / "meminfo")
    assert main_memory() == 120 * 1024
    for content in ("", "MemTotal: many\nSwapTotal: 1 kB"):
        (tmp_path / "meminfo").write_text(content)
        assert main_memory() is None
    monkeypatch.setattr(memory_plan, "MEMINFO", tmp_path / "absent")
    assert main_memory() is None


def test_notes() -> None:
    assert MemoryPlan().note(60) == ""
    assert "take turns" in MemoryPlan(True).note(60)
    assert "30 of the network's 60 blocks are copied to it in every step" in MemoryPlan(True, 30).note(60)


def six_references() -> Any:
    """The start noise of a 1024 x 1024 output and six references, which share as much."""
    shape, each = LatentShape(1, 64, 64), LatentShape(1, 26, 26)
    references = [torch.empty(1, 16, 1, 2 * each.height, 2 * each.width, device=DEVICE) for _ in range(6)]
    return pack_with_references(torch.empty(1, shape.num_tokens, 64, device=DEVICE), shape, [references])


@pytest.mark.parametrize(("storage", "gib"), [(Storage(fp8=True), 23.5), (Storage(left_behind=32), 23.5)])
def test_the_released_network_on_a_24_gb_card(storage: Storage, gib: float) -> None:
    sizes = FP8 if storage.fp8 else BF16
    assert planned(sizes, gib).left_behind <= storage.left_behind
    with counting() as counted, torch.no_grad():
        made = network(MMDiTConfig(), storage, torch.bfloat16)
        held = counted.now
        text = TextCond(torch.empty(1, 1300, 3584, dtype=torch.bfloat16, device=DEVICE), None)
        made(six_references(), 0.5, text)
        assert counted.now < held + GIB / 4, "what was restored is gone"
    assert held == pytest.approx(sizes.network + (60 - storage.left_behind) * sizes.block, rel=0.01)
    assert counted.peak - held < WORKING_BYTES / 3
    assert counted.peak < gib * GIB


def test_the_vae_works_in_what_is_kept_free() -> None:
    with counting() as counted, torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = ImageVAE(VAEConfig())
        finally:
            torch.set_default_dtype(torch.float32)
        counted.peak = held = counted.now
        vae.decode(torch.empty(1, 16, 1, 128, 128, device=DEVICE))
        vae.encode(torch.empty(1, 3, 1024, 1024, device=DEVICE))
    assert counted.peak - held < WORKING_BYTES / 2


def test_the_command_line_refuses_before_it_loads(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_plan, "main_memory", lambda: 10_000_000)
    monkeypatch.setattr("unipic_core.pipeline.pipeline.load_parts", lambda *_: pytest.fail("nothing may load"))
    out = str(tmp_path / "out.png")
    assert main(["compose", "--prompt", "a cat", "--device", "cpu", "--out", out]) == 2
    line = capsys.readouterr().err
    assert "of main memory, this machine has 0.0 GB" in line
    assert "--storage fp8, use --dtype bf16" in line
    assert main(["compose", "--prompt", "a cat", "--device", "cpu", "--out", out, "--storage", "int3"]) == 2
    assert "the storage must be one of auto, full, fp8, got 'int3'" in capsys.readouterr().err
