"""UniPicCompare: a labelled grid over seeds, steps, guidance, LoRA strengths and reference budgets."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui
from torch import Tensor

from ..unipic_core.errors import UniPicError
from ..unipic_core.run.grid import labelled_grid
from . import CATEGORY
from .host.compare.axes import AXES, MOST_CELLS, NONE, Axis, Cell, parsed_axis, spanned
from .host.compare.run import Comparison, Sockets
from .host.compare.store import CellStore
from .host.messages import tell
from .host.model.kv_cache import with_kv_cache
from .host.pictures.images import to_image, to_pictures
from .host.sampling.choices import AUTO, Widgets
from .host.wires import check_conditioning, check_model, check_part
from .lora import add_lora, file_state, lora_names, lora_path, matched, read_lora
from .sample import cache_dtype_input, cache_input, sampling_inputs, schedule_inputs

VALUES = (
    "Values separated by commas. seed: 1, 2, 3. steps: 4, 8, 16. guidance: 1, 2.5, 4. lora_strength: 0, 0.5, 1. "
    "reference_budget: 512, 1024."
)


class UniPicCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicCompare",
            display_name="Compare (UniPic)",
            category=CATEGORY,
            description="A labelled grid of pictures over one or two settings, each as Few-Step Sampler and VAE Decode "
            "give it. Finished pictures are stored in ComfyUI's output folder, so an interrupted run goes on where it "
            "stopped.",
            search_aliases=["unipic compare", "xy plot", "x/y plot", "grid", "variations", "对比"],
            inputs=[*_sockets(), *sampling_inputs(), *_axis_inputs(), *schedule_inputs(), *_cache_inputs()],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The labelled grid."),
                io.Image.Output(display_name="images", tooltip="The pictures as a batch, row by row."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, lora: str = NONE) -> bool:
        """Accept names that are not in the list, as Distill LoRA does."""
        return True

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = NONE, **_: object) -> Any:
        return None if lora == NONE else file_state(lora)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        negative: list[Any],
        latent: dict[str, Any],
        vae: VAE,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        denoise: float,
        x_axis: str,
        x_values: str,
        y_axis: str,
        y_values: str,
        lora: str = NONE,
        schedule: str = AUTO,
        shift: float = 0.0,
        condition_cache: str = AUTO,
        cache_dtype: str = AUTO,
    ) -> io.NodeOutput:
        check_model(model)
        check_conditioning("positive", positive)
        check_conditioning("negative", negative)
        check_part("vae", vae, "first_stage_model")
        x, y = parsed_axis("x", x_axis, x_values), parsed_axis("y", y_axis, y_values)
        rows = spanned(Cell(seed, Widgets(steps, cfg, sampler, schedule, shift)), x, y)
        model = with_kv_cache(model, condition_cache, cache_dtype)
        cautions: list[str] = []
        with_lora = WithLoRA(model, lora, (x, y), cautions)
        sockets = Sockets(model, positive, negative, latent, vae, denoise, with_lora)
        comparison = Comparison(sockets, CellStore(), cautions)
        count = sum(map(len, rows))

        def report(number: int, cell: Cell, line: str) -> None:
            text = f"picture {number} of {count}: seed {cell.seed}, {line}"
            level = logging.WARNING if cautions else logging.INFO
            tell(cls, "; ".join([text, *dict.fromkeys(cautions)]), level)

        images = comparison.pictures([cell for row in rows for cell in row], report)
        grid = drawn(images, x, y)
        return io.NodeOutput(grid, torch.cat(images), ui=ui.PreviewImage(grid, cls=cls))


class WithLoRA:
    """The MODEL with the LoRA of the widget at a strength. Raises UniPicError for an axis without a LoRA.

    cautions: gets a line where layers of the LoRA are not in the model.
    """

    def __init__(self, model: ModelPatcher, name: str, axes: tuple[Axis, ...], cautions: list[str]) -> None:
        varied = "lora_strength" in {axis.name for axis in axes}
        if varied and name == NONE:
            raise UniPicError("the axis lora_strength needs a LoRA; choose one in the widget lora")
        if name != NONE and not varied:
            raise UniPicError(
                f"lora is {name!r}, but no axis varies its strength; choose lora_strength for an axis, or set lora to "
                "none and add the LoRA with Distill LoRA"
            )
        self.model = model
        self.cautions = cautions
        self.lora = read_lora(lora_path(name)) if varied else None

    def __call__(self, strength: float) -> ModelPatcher:
        if strength == 0 or self.lora is None:
            return self.model
        model, report = add_lora(self.model, self.lora, strength)
        if report.unmatched:
            self.cautions.append(matched(self.lora, report))
        changed: ModelPatcher = model
        return changed


def drawn(images: list[Tensor], x: Axis, y: Axis) -> Tensor:
    """The labelled grid as IMAGE, from pictures row by row."""
    columns = max(len(x.values), 1)
    pictures = [picture for image in images for picture in to_pictures(image)]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    return to_image(labelled_grid(rows, x.labels, y.labels))


def _sockets() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="From Load UniPic or Distill LoRA."),
        io.Conditioning.Input("positive", tooltip="Prompt and pictures, from Multi-Image Compose."),
        io.Conditioning.Input("negative", tooltip="Negative prompt and pictures. Not used at guidance 1."),
        io.Latent.Input("latent", tooltip="Sets the pictures' size. One picture: batch_size 1."),
        io.Vae.Input("vae", tooltip="From Load UniPic, to decode the pictures."),
    ]


def _axis_inputs() -> list[Any]:
    def axis(side: str, default: str, where: str) -> io.Combo.Input:
        return io.Combo.Input(
            f"{side}_axis",
            options=[NONE, *AXES],
            default=default,
            tooltip=f"The setting that varies {where}. Its widget above is not used. At most {MOST_CELLS} pictures.",
        )

    def values(side: str, default: str) -> io.String.Input:
        return io.String.Input(f"{side}_values", default=default, tooltip=VALUES)

    return [
        axis("x", "seed", "from column to column"),
        values("x", "1, 2, 3"),
        axis("y", NONE, "from row to row"),
        values("y", ""),
        io.Combo.Input(
            "lora",
            options=[NONE, *lora_names()],
            default=NONE,
            optional=True,
            tooltip="The LoRA whose strength the axis lora_strength varies, added as Distill LoRA does.",
        ),
    ]


def _cache_inputs() -> list[Any]:
    return [cache_input(), cache_dtype_input()]
