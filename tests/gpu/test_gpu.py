"""What only a GPU can show: the same pictures as on the CPU, bf16, and a training step there. Skipped without one."""

from dataclasses import replace

import pytest
import torch

from trainers.loop.loop import train
from trainers.methods.sft_text import SFTWithText
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.images import load_image
from unipic_core.pipeline import UniPicPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPT = "Put the guitar from image 2 left of the astronaut from image 1, on the beach of image 3."


def compose(examples, dtype, device):
    pipe = UniPicPipeline.from_pretrained(DEFAULT_MODEL, torch_dtype=dtype, device=device)
    images = [load_image(examples / f"{name}.png") for name in ("astronaut", "guitar", "beach")]
    return pipe(images, PROMPT, num_inference_steps=8, seed=1, output_type="pt").images.cpu()


def test_same_picture_as_on_the_cpu(examples):
    cpu = compose(examples, torch.float32, "cpu")
    assert (compose(examples, torch.float32, "cuda") - cpu).abs().max() < 2e-2
    assert (compose(examples, torch.bfloat16, "cuda") - cpu).abs().mean() < 5e-2


def test_training_runs_and_resumes(run, tmp_path):
    config = replace(run, output=str(tmp_path / "run"), steps=4, precision="bf16")
    train(replace(config, steps=2), SFTWithText(config))
    export = train(config, SFTWithText(config), allow_change=["steps"])
    assert (export / "unipic_sft" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
