"""LoadUniPic: a model on disk -> MODEL, CLIP and VAE of ComfyUI's own kinds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import comfy.utils
import folder_paths
from comfy.sd import VAE
from comfy_api.latest import io

from ..unipic_core.errors import UniPicError
from ..unipic_core.run.plan import resolve
from ..unipic_core.weights.formats.safetensors_file import read_table
from ..unipic_core.weights.recipe import Recipe
from ..unipic_core.weights.transformer import looks_like
from ..unipic_core.weights.vae import config_of_file
from . import CATEGORY
from .host import model_paths as sources
from .host.messages import tell
from .host.model.latent_format import PictureLatents, fit_preview, read_latent_format
from .host.model.loading import WEIGHT_DTYPES, load_model
from .host.recipe_attachment import attach, facts_of


class LoadUniPic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadUniPic",
            display_name="Load UniPic",
            category=CATEGORY,
            description="Loads a UniPic 3 or Qwen-Image-Edit model with its text encoder and VAE.",
            search_aliases=["unipic", "qwen image edit"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(sources.models()),
                    default=sources.DEFAULT_MODEL,
                    tooltip="The bundled nano works with nothing downloaded. Released folders go into models/unipic or "
                    "models/diffusers, single transformer files into models/diffusion_models.",
                ),
                _part_input("text_encoder", sources.TEXT_ENCODER),
                _part_input("vae", sources.VAE),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="as stored",
                    tooltip="How the network's weights are kept in memory. fp8 takes half the memory of bf16 and is a "
                    "little less exact; a file that is fp8 already then stays as it is.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The network. It carries its recipe: Few-Step Sampler reads it."),
                io.Clip.Output(tooltip="The text encoder, which also sees the reference pictures."),
                io.Vae.Output(tooltip="Between pictures and latents."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str, text_encoder: str, vae: str) -> bool:
        """Names that are not in the lists are left to `execute`, which says what is missing and where it goes."""
        return True

    @classmethod
    def execute(cls, model: str, text_encoder: str, vae: str, weight_dtype: str) -> io.NodeOutput:
        source = sources.find_model(model)
        encoder_path = sources.find_part(sources.TEXT_ENCODER, text_encoder, source)
        vae_path = sources.find_part(sources.VAE, vae, source)
        latents = read_latent_format(source)
        loaded_vae = load_vae(vae_path)
        check_vae(loaded_vae, latents, vae_path)
        if latents.latent_rgb_factors is None:
            fit_preview(latents, loaded_vae.decode)
        patcher = load_model(source, weight_dtype, latents)
        if facts_of(patcher).recipe == Recipe():
            tell(cls, without_recipe(source), logging.WARNING)
        clip = load_clip(encoder_path, patcher.model.diffusion_model.config.joint_attention_dim)
        attach(clip.patcher, facts_of(patcher))
        return io.NodeOutput(patcher, clip, loaded_vae)


def without_recipe(source: Path) -> str:
    """What happens to weights that say nothing of their use, and what to do if that is wrong."""
    return (
        f"{source.name} brings no recipe and its name says nothing, so it runs with {resolve(Recipe())}; if "
        "it is a few-step model, keep the repository's name in its own, such as Unipic3-DMD, or set steps, cfg and "
        "sampler in Few-Step Sampler"
    )


def _part_input(name: str, kind: sources.FileKind) -> io.Combo.Input:
    tooltip = f"auto: the model folder's own, else the {kind.prefix} file in models/{kind.folder}."
    return io.Combo.Input(name, options=sources.choices(kind), default=sources.AUTO, tooltip=tooltip)


def load_clip(path: Path, width: int) -> comfy.sd.CLIP:
    """From a pipeline folder, or a file of Qwen2.5-VL as ComfyUI has it. width: what the network takes. UniPicError."""
    if path.is_dir():
        from .host.text.encoder import load_clip as from_folder

        return from_folder(path)
    shapes = checked_shapes(path, "a text encoder", sources.TEXT_ENCODER)
    found = next((shape[1] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), width)
    if found != width:
        raise UniPicError(
            f"this model takes text of width {width}, and {path.name} gives {found}; they belong to different models: "
            "choose auto, or another text encoder"
        )
    embeddings = folder_paths.get_folder_paths("embeddings")
    with readable(path, sources.TEXT_ENCODER):
        return comfy.sd.load_clip([str(path)], embeddings, comfy.sd.CLIPType.QWEN_IMAGE)


def load_vae(path: Path) -> comfy.sd.VAE:
    """From a pipeline folder's vae/, or a file: in two dimensions where it is the Qwen-Image VAE. UniPicError."""
    if path.is_dir() or config_of_file(checked_shapes(path, "a VAE", sources.VAE)) is not None:
        from .host.pictures.vae import load_vae as for_pictures

        return for_pictures(path)
    with readable(path, sources.VAE):
        tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
        vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(path), metadata, None))
    return vae


def check_vae(vae: VAE, latents: PictureLatents, path: Path) -> None:
    """UniPicError if the VAE makes latents of another kind than the network's."""
    if vae.latent_channels != latents.latent_channels:
        raise UniPicError(
            f"this model works on latents of {latents.latent_channels} channels, and the VAE {path.name} makes "
            f"{vae.latent_channels}; they belong to different models: choose auto, or another VAE"
        )


def checked_shapes(path: Path, expected: str, kind: sources.FileKind) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, without loading them. UniPicError if it is damaged, hostile or something else."""
    shapes = {name: spec.shape for name, spec in read_table(path)[0].items()}
    looks = looks_like(shapes)
    if looks not in (expected, "unknown weights"):
        raise UniPicError(f"{path.name} is not {expected}, it looks like {looks}; use {kind.get}")
    return shapes


@contextmanager
def readable(path: Path, kind: sources.FileKind) -> Iterator[None]:
    """ComfyUI's loaders fail in many ways on a file that they do not know; say it in one."""
    try:
        yield
    except Exception as error:
        if management.is_oom(error):
            raise
        detail = " ".join(str(error).split())[:200]
        raise UniPicError(f"ComfyUI cannot use {path.name} as {kind.what} ({detail}); use {kind.get}") from error
