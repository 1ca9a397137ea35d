"""Whatever a user may bring, through the real command line: exit code, one readable line, nothing written or lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unipic_core.cli import main
from unipic_core.model.mmdit import MMDiT

BEFORE = b"the picture of before"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Place:
    """A user's folder with a picture, a model and an older output, and the command that would compose."""

    folder: Path
    golden: Path
    patch: pytest.MonkeyPatch
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        Image.new("RGB", (20, 10), "red").save(self.folder / "cat.png")
        self.out.write_bytes(BEFORE)
        self.images = [self.folder / "cat.png"]
        self.model = self.golden / "tiny"
        self.prompt = "a cat"

    @property
    def out(self) -> Path:
        return self.folder / "out.png"

    def image(self, picture: Image.Image, name: str = "a.png", **options: Any) -> None:
        self.images = [self.folder / name]
        picture.save(self.images[0], **options)

    def copied(self) -> Path:
        """A model of one's own to damage."""
        self.model = shutil.copytree(self.golden / "tiny", self.folder / "model")
        return self.model

    def add(self, *arguments: object) -> None:
        self.arguments += map(str, arguments)

    def command(self) -> list[str]:
        fast = ["--size", "32x16", "--steps", "1", "--cfg", "1", "--reference-budget", "32", "--device", "cpu"]
        what = ["compose", *map(str, self.images), "--prompt", self.prompt, "--model", str(self.model)]
        return [*what, *fast, "--out", str(self.out), "--overwrite", *self.arguments]

    def held(self) -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, golden, monkeypatch)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and what was said on stderr, beside the progress."""
    try:
        code: Any = main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return code, [x for x in said if x.strip() and not x.startswith(("references", "loading", "composing"))]


# --- what works ----------------------------------------------------------------------------------------------------


def rotated(p: Place) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    p.image(Image.new("RGB", (40, 20)), exif=exif)


def animated(p: Place) -> None:
    p.image(Image.new("RGB", (9, 9), "red"), "a.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")])


def no_pictures(p: Place) -> None:
    p.images = []


WORKS: dict[str, tuple[Callable[[Place], Any], str]] = {
    "greyscale": (lambda p: p.image(Image.new("L", (30, 20), 90)), ""),
    "16 bit": (lambda p: p.image(Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16))), ""),
    "CMYK": (lambda p: p.image(Image.new("CMYK", (30, 20)), "a.jpg"), ""),
    "palette": (lambda p: p.image(Image.new("P", (30, 20)), transparency=0), ""),
    "alpha": (lambda p: p.image(Image.new("RGBA", (30, 20), (9, 9, 9, 99))), ""),
    "EXIF rotation": (rotated, ""),
    "1x1": (lambda p: p.image(Image.new("RGB", (1, 1))), ""),
    "600x10": (lambda p: p.image(Image.new("RGB", (600, 10))), ""),
    "animated": (animated, "a.gif is animated; its first frame of 2 is used"),
    "no pictures": (no_pictures, "no pictures given"),
    "empty prompt": (lambda p: setattr(p, "prompt", ""), ""),
    "5,000 words": (lambda p: setattr(p, "prompt", "a " * 5000), "tokens; the model was trained up to"),
}


@pytest.mark.parametrize("case", WORKS)
def test_works(case: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, warning = WORKS[case]
    prepare(place)
    before = place.held()
    code, said = run(place.command(), capsys)
    assert code == 0, said
    assert len(said) == bool(warning), said
    assert not warning or (said[0].startswith("warning: ") and warning in said[0])
    assert Image.open(place.out).size == (32, 16)
    assert {p: b for p, b in place.held().items() if p != place.out} == {
        p: b for p, b in before.items() if p != place.out
    }


# --- what does not -------------------------------------------------------------------------------------------------


def cut(path: Path, kept: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:kept])


def truncated_picture(p: Place) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    p.image(Image.fromarray(noise))
    cut(p.images[0], 3000)


def no_picture(p: Place) -> None:
    p.images = [p.folder / "a.png"]
    p.images[0].write_text("not a picture")


def wrong_folder(p: Place) -> None:
    p.model = p.folder


def missing_parts(p: Place) -> None:
    for part in ("vae", "text_encoder"):
        shutil.rmtree(p.copied() / part if part == "vae" else p.model / part)


def one_file(p: Place) -> None:
    p.model = p.golden / "tiny" / "transformer" / WEIGHTS


def truncated_weights(p: Place) -> None:
    cut(p.copied() / "transformer" / WEIGHTS, 5000)


def truncated_vae(p: Place) -> None:
    cut(p.copied() / "vae" / WEIGHTS, 50_000)


def header(content: bytes, length: int | None = None) -> Callable[[Place], None]:
    def prepare(p: Place) -> None:
        file = p.copied() / "transformer" / WEIGHTS
        file.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content)

    return prepare


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def hostile_pickle(p: Place) -> None:
    with open(p.folder / "evil.bin", "wb") as f:
        pickle.dump({"img_in.weight": Evil()}, f)
    p.add("--transformer", p.folder / "evil.bin")


def hostile_pickle_in_a_zip(p: Place) -> None:
    torch.save({"img_in.weight": torch.zeros(2), "x": Evil()}, p.folder / "evil.bin")
    p.add("--lora", p.folder / "evil.bin")


def leaving_index(p: Place) -> None:
    shutil.copy(p.golden / "tiny" / "transformer" / WEIGHTS, p.folder / "secret.safetensors")
    index = p.copied() / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"img_in.weight": "../../secret.safetensors"}}))


def other_architecture(p: Place) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, p.folder / "flux.safetensors")
    p.add("--transformer", p.folder / "flux.safetensors")


def not_finite(p: Place) -> None:
    file = p.copied() / "transformer" / WEIGHTS
    weights = load_file(file)
    weights["proj_out.weight"].fill_(float("nan"))
    save_file(weights, file)


def out_of_memory(p: Place) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    p.patch.setattr(MMDiT, "forward", forward)


def absurd_recipe(p: Place) -> None:
    (p.copied() / "recipe.json").write_text('{"steps": 1000000000}')


def forbidden_folder(p: Place) -> None:
    p.patch.setattr(os, "access", lambda path, mode: False)


def disk_fails(p: Place) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    p.patch.setattr(Image.Image, "save", save)


def having(*arguments: object) -> Callable[[Place], None]:
    return lambda p: p.add(*arguments)


FAILS: dict[str, tuple[Callable[[Place], Any], str]] = {
    "truncated picture": (truncated_picture, "a.png is damaged or truncated"),
    "not a picture": (no_picture, "a.png is not a picture that can be read; use PNG"),
    "a folder as picture": (lambda p: setattr(p, "images", [p.folder]), "is a folder, not a picture"),
    "7 pictures": (lambda p: setattr(p, "images", p.images * 7), "at most 6 pictures can be composed, got 7"),
    "size not of 16": (having("--size", "50x48"), "multiples of 16, got 50x48; use 48x48"),
    "size over the budget": (having("--size", "4096x4096"), "over this model's 1024x1024 pixels; use 1024x1024"),
    "negative size": (having("--size=-16x16"), "width must be positive whole pixels, got -16"),
    "wrong folder": (wrong_folder, "has no text_encoder/, tokenizer/, vae/; download"),
    "missing parts": (missing_parts, "no text_encoder/, vae/; download Qwen/Qwen-Image-Edit"),
    "one file as the model": (one_file, "give the file as --transformer and, as the model, a folder with"),
    "truncated safetensors": (truncated_weights, "fetch it again"),
    "truncated VAE": (truncated_vae, "fetch it again"),
    "header longer than the file": (header(b"{}", 2**60), "not a whole safetensors file"),
    "header of nested lists": (header(b"[" * 100_000), "its header is not JSON"),
    "header with negative offsets": (
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
        "does not give type, shape and place of tensor 'a'",
    ),
    "header with a huge shape": (
        header(b'{"a":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}'),
        "is truncated or damaged: tensor 'a'",
    ),
    "hostile pickle": (hostile_pickle, "evil.bin"),
    "hostile pickle in a zip": (hostile_pickle_in_a_zip, "asks to run code when opened"),
    "index leaving the folder": (leaving_index, "outside its folder; refused"),
    "another architecture": (other_architecture, "looks like a FLUX transformer"),
    "absurd recipe": (absurd_recipe, "recipe's steps should be a whole number from 1 to 1000"),
    "weights of NaN": (not_finite, "NaN or infinite in step 1; use bfloat16 or float32"),
    "out of memory": (out_of_memory, "out of memory; lower the output size (now 32x16), or the reference budget"),
    "20000x10": (
        lambda p: p.image(Image.new("RGB", (20000, 10))),
        "image 1 (20000x10) is too thin: it would be seen at",
    ),
    "output in no folder": (having("--out", "absent/a.png"), "no folder absent"),
    "output is a folder": (having("--out", "dir.png"), "is a folder; name a file in it"),
    "output with a name too long": (having("--out", "x" * 300 + ".png"), "cannot be written"),
    "output forbidden": (forbidden_folder, "may not be written"),
    "output fails": (disk_fails, "out.png: Permission denied"),
}


@pytest.mark.parametrize("case", FAILS)
def test_fails(case: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, message = FAILS[case]
    (place.folder / "dir.png").mkdir()
    prepare(place)
    before = place.held()
    code, said = run(place.command(), capsys)
    assert code == 2, said
    assert len(said) == 1, said
    assert message in said[0]
    assert "Traceback" not in said[0]
    assert place.held() == before  # no output, no half-written file, and no code from a pickle ran
    assert before[place.out] == BEFORE
