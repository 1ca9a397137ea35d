"""The extra [curate]: a missing package is "not run"; an installed one separates good pictures from spoilt ones."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tests.paths import PICTURES
from tests.trainers.curate.test_filters import textured
from tests.trainers.curate.test_run import config, manifest
from trainers.curate.config import read_stages
from trainers.curate.filters.catalogue import FILTERS
from trainers.curate.filters.packages import NEEDS, brisque, measure_with_package, missing, text
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


@needs["brisque"]
def test_brisque_separates_spoilt_pictures():
    sharp = textured(512)
    clean = measure_with_package("brisque", Decoded(sharp))
    for sigma in (2, 4):
        assert measure_with_package("brisque", Decoded(sharp.filter(ImageFilter.GaussianBlur(sigma)))) > clean + 20
    buffer = io.BytesIO()
    sharp.save(buffer, "JPEG", quality=5)
    assert measure_with_package("brisque", Decoded(Image.open(buffer).convert("RGB"))) > clean


@needs["text"]
def test_watermarks_are_read():
    picture = textured(512).filter(ImageFilter.GaussianBlur(3))
    assert measure_with_package("text", Decoded(picture)) <= FILTERS["text"].most
    ImageDraw.Draw(picture).text((60, 440), "SAMPLE WATERMARK", fill="white", font=ImageFont.load_default(40))
    assert measure_with_package("text", Decoded(picture)) > FILTERS["text"].most


@needs["head"]
def test_a_picture_without_a_face_has_no_head():
    assert measure_with_package("head", Decoded(textured())) == 0
