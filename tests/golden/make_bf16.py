"""`python -m tests.golden.make_bf16`: the released network's velocities in bfloat16, by diffusers' class.

Each golden case gets `bf16.safetensors`: `velocity_i`, the conditional velocity [1, N_O, 4C] as float32 that the
network gives in bfloat16 on the float32 case's latents before step i, at the time that the release with that sampler
feeds it: bf16(t) where it re-noises, bf16(bf16(1000 t) / 1000) with Euler. Inputs are bfloat16 too.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent


def fed(t: Tensor, sampler: str) -> Tensor:
    """The time of one step, float64, as the release's two pipelines hand it to the network: [1] bfloat16."""
    if sampler == "euler":
        return (t.float() * 1000).expand(1).to(torch.bfloat16) / 1000
    return t.expand(1).to(torch.bfloat16)


def pack(latent: Tensor) -> Tensor:
    """[1, C, 1, H, W] -> [1, H W / 4, 4C]."""
    _, c, _, h, w = latent.shape
    return latent.reshape(1, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w // 4, 4 * c)


@torch.no_grad()
def velocities(folder: Path, network: QwenImageTransformer2DModel) -> dict[str, Tensor]:
    case = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    references = [pack(tensors[f"reference_latent_{i + 1}"]) for i in range(len(case["reference_sizes"]))]
    embeds = tensors["prompt_embeds"].to(torch.bfloat16)
    made = {}
    for step, t in enumerate(tensors["times"][:-1]):
        x_t = tensors["noise"] if step == 0 else tensors[f"latents_after_step_{step}"]
        velocity = network(
            hidden_states=torch.cat([x_t, *references], dim=1).to(torch.bfloat16),
            timestep=fed(t, case["sampler"]),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            img_shapes=[[tuple(shape) for shape in case["img_shapes"]]],
            return_dict=False,
        )[0]
        made[f"velocity_{step + 1}"] = velocity[:, : x_t.shape[1]].float().contiguous()
    return made


def main() -> None:
    network = QwenImageTransformer2DModel.from_pretrained(HERE / "tiny" / "transformer", torch_dtype=torch.bfloat16)
    for folder in sorted((HERE / "cases").iterdir()):
        save_file(velocities(folder, network.eval()), folder / "bf16.safetensors")


if __name__ == "__main__":
    main()
