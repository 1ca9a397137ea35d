"""The command `unipic compose`: checks what was asked for, loads, composes, writes."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..conditioning.images import load_image
from ..errors import UniPicError
from ..model.attention import attention_named
from ..model.compile import check_compiler
from ..pipeline.loading import find_recipe
from ..pipeline.loras import AddedLoRAs
from ..pipeline.offload import checked_device
from ..pipeline.pipeline import UniPicPipeline
from ..run.plan import checked_seed, plan, resolve
from ..weights.lora import read_lora
from ..weights.write_small import aside
from .outputs import check_outputs, free_path, output_paths
from .terminal import DEFAULT_MODEL, DTYPES, layers_added, progress_bar


def compose(args: argparse.Namespace) -> None:
    """Load, compose with a progress bar, write."""
    check_destinations(args)
    images = [load_image(path) for path in args.images]
    if args.model == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise UniPicError("the bundled model is not installed; name a model folder with --model")
    width, height = args.size or (None, None)
    wishes = {
        "height": height,
        "width": width,
        "num_inference_steps": args.steps,
        "true_cfg_scale": args.cfg,
        "sampler": args.sampler,
        "seed": args.seed,
        "num_images": args.num_images,
        "reference_budget": args.reference_budget,
    }
    steps = check_wishes(args, [image.size for image in images], wishes)
    with progress_bar("composing") as advance:  # around loading, which the bar's package may be absent for
        pipe = load_pipeline(args)
        out = pipe(images, args.prompt, args.negative, callback=lambda step, *_: advance(step + 1, steps), **wishes)
    paths = output_paths(args.out, out.seeds[0], len(out.images))
    for image, seed, named in zip(out.images, out.seeds, paths, strict=True):
        path = still_free(named, args)
        save_image(image, path, record(args, seed, image.size, out.settings))
        print(path)


def check_destinations(args: argparse.Namespace) -> None:
    """UniPicError if a picture would be written over something that is not to be replaced."""
    seed, count = checked_seed(args.seed, args.num_images)
    check_outputs(output_paths(args.out, seed, count), files_read(args), args.overwrite)


def files_read(args: argparse.Namespace) -> list[Path]:
    """Pictures and weight files that the arguments name."""
    return [*args.images, *(path for path, _ in args.lora), *([args.transformer] if args.transformer else [])]


def still_free(path: Path, args: argparse.Namespace) -> Path:
    """The path, or a free name with a warning if something has appeared there since it was checked."""
    try:
        check_outputs([path], files_read(args), args.overwrite)
    except UniPicError as error:
        free = free_path(path)
        warnings.warn(f"{error}; it appeared meanwhile, and the picture is written to {free}", stacklevel=2)
        return free
    return path


def check_wishes(args: argparse.Namespace, sizes: list[tuple[int, int]], wishes: dict[str, Any]) -> int:
    """The number of steps, after checking all that can be checked before gigabytes are read."""
    _, recipe = find_recipe(args.model, args.transformer)
    loras = AddedLoRAs()
    for path, strength in args.lora:
        loras = loras.add(path, read_lora(path, mapped=True).recipe, strength)
        resolve(loras.over(recipe))  # as load_lora will, one by one
    device = checked_device(device_name(args))
    attention_named(args.attention)
    if args.compile:
        check_compiler(device)
    return plan(loras.over(recipe), sizes, args.prompt, args.negative, **wishes).settings.steps


def load_pipeline(args: argparse.Namespace) -> UniPicPipeline:
    """The pipeline with its LoRAs, on the device asked for."""
    from transformers.utils import logging  # takes a second, which bad wishes should not wait for

    if not args.debug:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = device_name(args)
    name = ("fp32" if device == "cpu" else "bf16") if args.dtype == "auto" else args.dtype
    dtype = getattr(torch, DTYPES[name])
    print(f"loading {args.model.name} on {device} in {name}", file=sys.stderr)
    pipe = UniPicPipeline.from_pretrained(
        args.model,
        args.transformer,
        torch_dtype=dtype,
        device=device,
        attention=args.attention,
        compile=args.compile,
    )
    for path, strength in args.lora:
        report = pipe.load_lora(path, strength)
        print(layers_added(path, strength, report), file=sys.stderr)
    return pipe


def device_name(args: argparse.Namespace) -> str:
    """The device that was asked for, or the best that is there."""
    given: str = args.device
    return given if given != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def record(args: argparse.Namespace, seed: int, size: tuple[int, int], settings: Any) -> dict[str, Any]:
    """What made a picture, for its file."""
    return {
        "prompt": args.prompt,
        "negative_prompt": args.negative,
        "images": [path.name for path in args.images],
        "seed": seed,
        "size": list(size),
        "model": args.model.resolve().name,
        "transformer": args.transformer and args.transformer.name,
        "lora": [[path.name, strength] for path, strength in args.lora],
        "attention": args.attention,
        "recipe": vars(settings),
        "version": __version__,
    }


def save_image(image: Any, path: Path, made_by: dict[str, Any]) -> None:
    """Write aside and rename: no half-written file is ever seen. PNG keeps `made_by` in its text chunk "unipic"."""
    kind = {"png": "PNG", "webp": "WEBP"}.get(path.suffix.lower()[1:], "JPEG")
    options: dict[str, Any] = {"quality": 95}
    if kind == "PNG":
        info = PngInfo()
        info.add_text("unipic", json.dumps(made_by))
        options = {"pnginfo": info}
    try:
        with aside(path) as partial:
            image.save(partial, format=kind, **options)
    except OSError as error:
        raise UniPicError(f"cannot write {path}: {error.strerror or error}") from error
