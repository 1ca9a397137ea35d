"""The extra [curate]: a missing package is "not run"; an installed one separates good pictures from spoilt ones."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from tests.paths import PICTURES
from tests.trainers.curate.test_filters import textured
from tests.trainers.curate.test_run import config, manifest
from trainers.curate.config import read_stages
from trainers.curate.filters.catalogue import FILTERS
from trainers.curate.filters.packages import (
    NEEDS,
    brisque,
    compare_with_package,
    measure_with_package,
    missing,
    text,
)
from trainers.curate.filters.picture import Decoded
from trainers.curate.runner import run

needs = {name: pytest.mark.skipif(missing(name) is not None, reason=f"needs {NEEDS[name]}") for name in NEEDS}


def test_every_filter_of_the_extra_has_a_package():
    assert {one.name for one in FILTERS.values() if one.rank == "extra"} == set(NEEDS)


def test_a_missing_package_is_not_run_and_tried_again(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.open(PICTURES / "panda.png").save(folder / "a.png")
    path = config(
        tmp_path, ingest=[{"kind": "folder", "path": str(folder)}], filter={"text": None}, pair=None, synthesise=None
    )
    with monkeypatch.context() as patch:
        patch.setitem(NEEDS, "text", ("no_such_package",))
        run(read_stages(path))
    (row,) = manifest(tmp_path / "out", "filter")
    assert row["keep"] is None
    expected = 'text not run: no_such_package is not installed; run pip install "comfyui-unipic[curate]"'
    assert row["reason"] == expected
    assert row["filters"]["text"]["rank"] == "extra"
    with monkeypatch.context() as patch:
        patch.setitem(NEEDS, "text", ())
        patch.setattr(text, "text", lambda picture: 0.004)
        run(read_stages(path))
    (row,) = manifest(tmp_path / "out", "filter")
    assert row["keep"] is True


def test_shapes_of_known_distributions():
    """A Gaussian has shape 2, a Laplacian 1."""
    rng = np.random.default_rng(0)
    assert brisque.fit(rng.normal(size=100_000))[0] == pytest.approx(2, abs=0.05)
    assert brisque.fit(rng.laplace(size=100_000))[0] == pytest.approx(1, abs=0.03)
    shape, mean, left, right = brisque.fit(np.where((x := rng.normal(size=100_000)) < 0, x, 2 * x))
    assert right / left == pytest.approx(2, abs=0.03)
    assert mean > 0
    assert shape > 1
    assert brisque.shape_of(math.gamma(1) ** 2 / (math.gamma(0.5) * math.gamma(1.5))) == pytest.approx(2)


def test_halving_keeps_constants_and_slopes():
    assert brisque.halved(np.full((9, 12), 0.25)) == pytest.approx(np.full((4, 6), 0.25))
    slope = np.tile(np.arange(16.0), (16, 1))
    assert brisque.halved(slope)[4, 2:6] == pytest.approx(np.arange(2, 6) * 2 + 0.5)


def test_area_of_a_polygon():
    assert text.polygon_area(np.array([[0, 0], [4, 0], [4, 2], [0, 2]])) == 8


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image, which brisque's package brings along."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    return Image.open(folder / name).convert("RGB")


@needs["brisque"]
@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png"])
def test_brisque_separates_spoilt_photographs_from_clean_ones(name):
    clean = photograph(name)
    enlarged = clean.resize((4 * clean.width, 4 * clean.height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=10)
    spoilt = [clean.filter(ImageFilter.GaussianBlur(sigma)) for sigma in (1, 2, 4)]
    spoilt += [enlarged.crop((0, 0, 1024, 1024)), Image.open(buffer).convert("RGB")]
    assert measure_with_package("brisque", Decoded(clean)) < FILTERS["brisque"].most
    for picture in spoilt:
        assert measure_with_package("brisque", Decoded(picture)) > FILTERS["brisque"].most


@needs["text"]
def test_watermarks_are_read_and_pictures_without_text_say_nothing(capfd):
    picture = photograph("coffee.png")
    assert measure_with_package("text", Decoded(picture)) == 0
    assert "".join(capfd.readouterr()) == ""  # a line per picture would bury the progress
    ImageDraw.Draw(picture).text((60, 340), "SAMPLE WATERMARK", fill="white", font=ImageFont.load_default(40))
    assert measure_with_package("text", Decoded(picture)) > FILTERS["text"].most
    assert measure_with_package("text", Decoded(photograph("page.png"))) > 0.3


@needs["head"]
def test_cut_heads_are_seen():
    whole = photograph("astronaut.png")
    cut = [whole.crop(box) for box in ((0, 60, 512, 512), (0, 100, 512, 512), (200, 0, 512, 512))]
    scores = [measure_with_package("head", Decoded(picture)) for picture in (whole, *cut)]
    assert scores[0] == 1
    assert max(scores[1:]) < FILTERS["head"].least
    assert scores[2] < scores[1]
    assert measure_with_package("head", Decoded(textured())) == 0


@needs["face_identity"]
def test_a_mirrored_person_is_the_same_one_and_a_picture_without_a_face_is_not_judged(tmp_path):
    person = photograph("astronaut.png")
    person.save(tmp_path / "source.png")
    ImageOps.mirror(person).resize((400, 400)).save(tmp_path / "same.png")
    photograph("coffee.png").save(tmp_path / "cup.png")

    def distance(target: str):
        sources = [{"subject": "person", "path": "source.png"}]
        return compare_with_package("face_identity", tmp_path, {"path": target, "sources": sources})

    assert distance("same.png") < 0.35 < FILTERS["face_identity"].most
    assert distance("cup.png") == {"not run": "no face was found in the target", "final": True}
