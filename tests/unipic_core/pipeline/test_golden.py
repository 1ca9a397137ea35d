"""Parity with the released recipe on tiny random models (tests/golden), through the pipeline that users call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.paths import GOLDEN
from unipic_core.conditioning.images import load_image, resize_references
from unipic_core.conditioning.reference_sizes import reference_sizes, vision_size
from unipic_core.conditioning.sequence import LatentShape, pack_with_references
from unipic_core.pipeline import UniPicPipeline
from unipic_core.sampling.schedules import base_times, few_step_times

CASES = sorted(p.name for p in (GOLDEN / "cases").iterdir())
CLOSE = 1e-4


@dataclass
class Case:
    values: dict[str, Any]
    images: list[Image.Image]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, name: str) -> Case:
        folder = GOLDEN / "cases" / name
        values = json.loads((folder / "case.json").read_text())
        images = [load_image(folder / f"image_{i + 1}.png") for i in range(len(values["reference_sizes"]))]
        return cls(values, images, load_file(folder / "tensors.safetensors"))

    @property
    def references(self) -> list[Image.Image]:
        return resize_references(self.images, self.values["reference_budget"])

    def run(self, pipe: UniPicPipeline, **more: Any) -> Any:
        v = self.values
        names = [f"step_noise_{i + 1}" for i in range(v["steps"])]
        noises = [self.tensors[name] for name in names if name in self.tensors]
        return pipe(
            self.images,
            v["prompt"],
            v["negative_prompt"],
            height=v["height"],
            width=v["width"],
            num_inference_steps=v["steps"],
            true_cfg_scale=v["true_cfg_scale"],
            sampler=v["sampler"],
            reference_budget=v["reference_budget"],
            latents=self.tensors["noise"],
            step_noise=noises or None,
            **more,
        )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case.read(request.param)


def difference(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max())


def test_reference_sizes_exactly() -> None:
    for entry in json.loads((GOLDEN / "reference_sizes.json").read_text()):
        sizes = reference_sizes([tuple(s) for s in entry["sizes"]], entry["budget"])
        assert [list(s) for s in sizes] == entry["reference_sizes"]
        assert [list(vision_size(s)) for s in sizes] == entry["vlm_sizes"]


def test_schedules_exactly() -> None:
    for entry in json.loads((GOLDEN / "schedules.json").read_text()):
        steps, tokens = entry["steps"], entry["image_tokens"]
        assert few_step_times(steps, tokens).tolist() == pytest.approx(entry["few_step"], rel=0, abs=1e-12)
        if entry["base"] is not None:
            assert base_times(steps, tokens).tolist() == pytest.approx(entry["base"], rel=0, abs=1e-12)


def test_sizes_and_times(case: Case, tiny: UniPicPipeline) -> None:
    v = case.values
    assert [list(r.size) for r in case.references] == v["reference_sizes"]
    shape = LatentShape.of_pixels(v["width"], v["height"])
    make = base_times if v["sampler"] == "euler" else few_step_times
    assert difference(make(v["steps"], shape.num_tokens, tiny.shift).float(), case.tensors["times"].float()) < 1e-6


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_text(case: Case, tiny: UniPicPipeline, name: str) -> None:
    with torch.no_grad():
        cond = tiny.text_encoder.encode([case.references], [case.values[name]])
    assert tiny.text_encoder.dropped == case.values["dropped_prefix_tokens"]
    assert cond.mask is None
    assert difference(cond.embeds, case.tensors[f"{name}_embeds"]) < CLOSE


def test_reference_latents(case: Case, tiny: UniPicPipeline) -> None:
    for i, latent in enumerate(tiny._encode_references(case.references)):
        assert difference(latent, case.tensors[f"reference_latent_{i + 1}"]) < CLOSE


def test_first_velocity(case: Case, tiny: UniPicPipeline) -> None:
    v = case.values
    shape = LatentShape.of_pixels(v["width"], v["height"])
    with torch.no_grad():
        cond = tiny.text_encoder.encode([case.references], [v["prompt"]])
        packed = pack_with_references(case.tensors["noise"], shape, [tiny._encode_references(case.references)])
        velocity = tiny.transformer(packed, 1.0, cond)
    assert [[s.frames, s.height, s.width] for s in packed.shapes[0]] == v["img_shapes"]
    assert difference(velocity, case.tensors["velocity_first"]) < CLOSE


def test_every_step_and_the_picture(case: Case, tiny: UniPicPipeline) -> None:
    steps: list[Tensor] = []
    out = case.run(tiny, callback=lambda step, t, x_t, x0: steps.append(x_t.clone()), output_type="pt")
    assert len(steps) == case.values["steps"]
    for i, x_t in enumerate(steps):
        assert difference(x_t, case.tensors[f"latents_after_step_{i + 1}"]) < CLOSE
    assert difference(out.images, case.tensors["decoded"]) < CLOSE
    assert difference(case.run(tiny, output_type="latent").images, steps[-1]) == 0
