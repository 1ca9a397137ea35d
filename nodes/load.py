"""LoadUniPic: ComfyUI's MODEL, CLIP and VAE from a model on disk."""

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

from ..unipic_core.errors import UniPicError, joined_lines
from ..unipic_core.run.plan import resolve
from ..unipic_core.weights.formats.safetensors_file import read_table
from ..unipic_core.weights.recipe import Recipe
from ..unipic_core.weights.transformer import looks_like
from ..unipic_core.weights.vae import config_of_file
from . import CATEGORY
from .host import model_paths as sources
from .host.file_states import file_states
from .host.messages import tell
from .host.model.latent_format import PictureLatents, fit_preview, read_latent_format
from .host.model.loading import WEIGHT_DTYPES, load_model
from .host.recipe_attachment import attach, attachment_of


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
                    tooltip="The model. unipic-nano comes with the pack and runs on a CPU. Put released folders into "
                    "models/unipic or models/diffusers, single transformer files into models/diffusion_models.",
                ),
                _part_input("text_encoder", sources.TEXT_ENCODER),
                _part_input("vae", sources.VAE),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="as stored",
                    tooltip="Type of the network's weights in memory. as stored = as in the file; fp8 = half the "
                    "memory of bf16, a little less exact.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, with its recipe: steps, guidance and sampler."),
                io.Clip.Output(tooltip="The text encoder, which also sees the pictures."),
                io.Vae.Output(tooltip="Encodes pictures to latents and decodes latents to pictures."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str, text_encoder: str, vae: str) -> bool:
        """Accept names that are not in the lists: `execute` names the missing file and its folder."""
        return True

    @classmethod
    def fingerprint_inputs(
        cls, model: str | None = None, text_encoder: str | None = None, vae: str | None = None, **_: object
    ) -> object:
        """States of the files, so that changed ones are loaded again; None for a name from a wire."""
        if model is None or text_encoder is None or vae is None:
            return None
        try:
            source = sources.find_model(model)
            parts = (sources.find_part(kind, name, source) for kind, name in _parts(text_encoder, vae))
            return [file_states(path) for path in (source, *parts)]
        except UniPicError as error:  # `execute` raises it where the user sees it
            return str(error)

    @classmethod
    def execute(cls, model: str, text_encoder: str, vae: str, weight_dtype: str) -> io.NodeOutput:
        source = sources.find_model(model)
        encoder_path, vae_path = (sources.find_part(kind, name, source) for kind, name in _parts(text_encoder, vae))
        latents = read_latent_format(vae_path if vae_path.is_dir() else source)
        loaded_vae = load_vae(vae_path)
        check_vae(loaded_vae, latents, vae_path)
        if latents.latent_rgb_factors is None:
            fit_preview(latents, loaded_vae.decode)
        patcher = load_model(source, weight_dtype, latents)
        if attachment_of(patcher).recipe == Recipe():
            tell(cls, without_recipe(source), logging.WARNING)
        clip = load_clip(encoder_path, patcher.model.diffusion_model.config.joint_attention_dim)
        attach(clip.patcher, attachment_of(patcher))
        return io.NodeOutput(patcher, clip, loaded_vae)


def _parts(text_encoder: str, vae: str) -> tuple[tuple[sources.FileKind, str], ...]:
    return (sources.TEXT_ENCODER, text_encoder), (sources.VAE, vae)


def without_recipe(source: Path) -> str:
    """Warning for weights without a recipe: the settings that they run with, and how to change them."""
    return (
        f"{source.name} has no recipe, so it runs with {resolve(Recipe())}; if it is a few-step model, keep the "
        "repository's name, such as Unipic3-DMD, in the folder's or file's name, or set steps, cfg and sampler in "
        "Few-Step Sampler"
    )


def _part_input(name: str, kind: sources.FileKind) -> io.Combo.Input:
    tooltip = f"auto = the one in the model's folder, else the {kind.prefix} file in models/{kind.folder}."
    return io.Combo.Input(name, options=sources.choices(kind), default=sources.AUTO, tooltip=tooltip)


def load_clip(path: Path, width: int) -> comfy.sd.CLIP:
    """The CLIP of a pipeline folder, or of a Qwen2.5-VL file for ComfyUI. width: the text width that the network takes.

    Raises UniPicError.
    """
    from .host.text.encoder import bundled_folder, load_saved, saved_prefix
    from .host.text.encoder import load_clip as from_folder

    if path.is_dir():
        return from_folder(path)
    shapes = checked_shapes(path, "a text encoder", sources.TEXT_ENCODER)
    embedding = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), (0, width))
    got = embedding[1]
    if got != width:
        raise UniPicError(
            f"this model expects text of width {width}, got {got} from {path.name}, which belongs to another model; "
            "choose auto, or another text encoder"
        )
    if folder := bundled_folder(embedding):
        return from_folder(folder, weights_file=path)
    embeddings = folder_paths.get_folder_paths("embeddings")
    with readable(path, sources.TEXT_ENCODER):
        if saved_prefix(shapes):
            return load_saved(path, embeddings)
        return comfy.sd.load_clip([str(path)], embeddings, comfy.sd.CLIPType.QWEN_IMAGE)


def load_vae(path: Path) -> comfy.sd.VAE:
    """The VAE of a pipeline folder's vae/, or of a file: in two dimensions if it is the Qwen-Image VAE. UniPicError."""
    if path.is_dir() or _is_image_vae(path):
        from .host.pictures.vae import load_vae as load_image_vae

        return load_image_vae(path)
    with readable(path, sources.VAE):
        tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
        vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(path), metadata, None))
    return vae


def _is_image_vae(path: Path) -> bool:
    """Whether a file, or a checkpoint with all parts, holds the Qwen-Image VAE in ComfyUI's layout."""
    shapes = checked_shapes(path, "a VAE", sources.VAE)
    return config_of_file(shapes) is not None


def check_vae(vae: VAE, latents: PictureLatents, path: Path) -> None:
    """UniPicError unless the VAE's latents have the network's number of channels."""
    if vae.latent_channels != latents.latent_channels:
        raise UniPicError(
            f"this model expects latents of {latents.latent_channels} channels, got {vae.latent_channels} from the VAE "
            f"{path.name}, which belongs to another model; choose auto, or another VAE"
        )


def checked_shapes(path: Path, expected: str, kind: sources.FileKind) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, without loading them. UniPicError if it is damaged or another kind of weights."""
    shapes = {name: spec.shape for name, spec in read_table(path)[0].items()}
    prefix = sources.checkpoint_prefix(shapes, kind)
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    looks = looks_like(shapes)
    if looks not in (expected, "unknown weights"):
        raise UniPicError(f"expected {expected}, got {path.name}, which looks like {looks}; use {kind.get}")
    return shapes


@contextmanager
def readable(path: Path, kind: sources.FileKind) -> Iterator[None]:
    """Context that turns any error of ComfyUI's loaders into one UniPicError; out of memory passes."""
    try:
        yield
    except Exception as error:
        if management.is_oom(error):
            raise
        detail = joined_lines(error)
        raise UniPicError(f"ComfyUI cannot use {path.name} as {kind.label} ({detail}); use {kind.get}") from error
