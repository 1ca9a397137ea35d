"""`python -m tests.benchmarks.vae [--json FILE]`: the VAE's exact 2-D form against diffusers' video VAE on one picture.

The released VAE's sizes with random weights, the same in both, float32, each call for one picture: pixels to normalised
latents and back. Both run in this process, in turns. Beside each figure stands what arithmetic makes of it: operations
at the rate of a large matrix product, timed in the same rounds, which convolutions may exceed; of the ratio, the 2-D
form's operations over the video VAE's, which are counted on tensors without memory. (A third would be left of the
convolutions over time; the layers that diffusers computes frame by frame, and attention, cost the same in both.)

The comparison of the outputs is also the round before those that count. All of it is 32 TFLOP at the default three
rounds: about four minutes on two quiet cores at the rate of their products (0.16 TFLOP a second), more where 3-D
convolutions are slower than that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage

from unipic_core.conditioning.sequence import VAE_SCALE
from unipic_core.model.vae import ImageVAE, VAEConfig, channels_last
from unipic_core.weights.vae import image_weight

from .arithmetic import count_flops
from .common import Columns, Run, draw, draw_bars, heading, line, machine, make_parser, result_file, write_json
from .gpu_parts import RELEASED
from .gpu_parts import TINY as TINY_PARTS
from .systems import CPU, Kind, rated

OURS, DIFFUSERS = "ours", "diffusers"
ROUNDS = 3


@dataclass(frozen=True)
class Setup:
    """sizes: sides of the picture in pixels. product: side of the matrices."""

    config: VAEConfig
    sizes: tuple[int, ...]
    product: int


FULL_SIZE = Setup(RELEASED.vae, (256, 512), 2048)
TINY = Setup(TINY_PARTS.vae, (32, 64), 64)


# --- what runs --------------------------------------------------------------------------------------------------------


def pair(config: VAEConfig, device: torch.device) -> tuple[ImageVAE, Any]:
    """Ours, as a vae/ folder is loaded, and diffusers', with the same weights."""
    with device:
        ours = ImageVAE(config)
        theirs: Any = AutoencoderKLQwenImage.from_config(config.to_dict())
    video = theirs.state_dict()
    ours.load_state_dict({name: image_weight(name, video[name]) for name in ours.state_dict()})
    return channels_last(ours).eval().requires_grad_(False), theirs.eval().requires_grad_(False)


def runs_of(networks: tuple[ImageVAE, Any], size: int) -> dict[str, dict[str, Run]]:
    """Direction -> whose -> a run, which returns latents or the picture."""
    ours, theirs = networks
    config, device = ours.config, ours.quant_conv.weight.device
    picture = torch.rand(1, 3, size, size, device=device) * 2 - 1
    latents = torch.randn(1, config.z_dim, 1, size // VAE_SCALE, size // VAE_SCALE, device=device)
    mean, std = torch.tensor([config.latents_mean, config.latents_std], device=device)[..., None, None, None]
    return {
        "encode": {
            OURS: lambda: ours.encode(picture),
            DIFFUSERS: lambda: (theirs.encode(picture[:, :, None]).latent_dist.mode() - mean) / std,
        },
        "decode": {
            OURS: lambda: ours.decode(latents),
            DIFFUSERS: lambda: theirs.decode(latents * std + mean).sample[:, :, 0],
        },
    }


@torch.no_grad()
def rows_of(setup: Setup, networks: tuple[ImageVAE, Any], size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each direction."""
    shapes = runs_of(pair(setup.config, torch.device("meta")), size)
    for direction, runs in runs_of(networks, size).items():
        difference = float((runs[OURS]() - runs[DIFFUSERS]()).abs().max())
        times, per_second = rated(runs, Kind(torch.float32), setup.product, rounds, warmup=0)
        flops = {whose: count_flops(run) for whose, run in shapes[direction].items()}
        row: dict[str, Any] = {"direction": direction, "size": size}
        for whose in runs:
            row |= {f"{whose}_seconds": times.median(whose), f"{whose}_arithmetic": flops[whose] / per_second}
        ratios = {"ratio": times.ratio(OURS, DIFFUSERS), "ratio_arithmetic": flops[OURS] / flops[DIFFUSERS]}
        yield {**row, **ratios, "max_difference": difference}


# --- what comes out ---------------------------------------------------------------------------------------------------

COLUMNS: Columns = {
    "direction": "<9",
    "size": ">4d",
    "ours_seconds": ">12.3f",
    "ours_arithmetic": ">15.3f",
    "diffusers_seconds": ">17.3f",
    "diffusers_arithmetic": ">20.3f",
    "ratio": ">6.3f",
    "ratio_arithmetic": ">16.3f",
    "max_difference": ">14.1e",
}
PANELS = ("time over diffusers'", "seconds")


def plot(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    names = [f"{row['direction']}, {row['size']} pixels" for row in rows]
    ratios = {name: (row["ratio"], row["ratio_arithmetic"]) for name, row in zip(names, rows, strict=True)}
    seconds = {
        f"{name}\n{whose}": (row[f"{whose}_seconds"], row[f"{whose}_arithmetic"])
        for name, row in zip(names, rows, strict=True)
        for whose in (OURS, DIFFUSERS)
    }
    for axis, figures in zip(axes, (ratios, seconds), strict=True):
        draw_bars(axis, figures)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser(__doc__, ROUNDS).parse_args(argv)
    setup, path = TINY if args.tiny else FULL_SIZE, result_file(args, "vae")
    torch.manual_seed(0)
    networks = pair(setup.config, CPU)
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    print(heading(COLUMNS))
    for size in setup.sizes:
        for row in rows_of(setup, networks, size, args.rounds):
            result["rows"].append(row)
            print(line(COLUMNS, row), flush=True)
            write_json(path, result)  # after every row: a long table may be cut short
    draw(path, PANELS, partial(plot, result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
