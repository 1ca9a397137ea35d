"""Measurements of pictures, near duplicates, percentiles, and decisions: a filter that did not run never passes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.paths import PICTURES
from trainers.curate.config import FilterConfig
from trainers.curate.errors import CurateError
from trainers.curate.filters import arithmetic
from trainers.curate.filters.calibration import Calibration
from trainers.curate.filters.catalogue import FILTERS, chosen
from trainers.curate.filters.decide import Decisions, outcome
from trainers.curate.filters.duplicates import Duplicates
from trainers.curate.filters.picture import Decoded, decode
from unipic_core.errors import UniPicError


def textured(side=256, seed=0) -> Image.Image:
    """A picture whose contrast is alike in all octaves, as in photographs."""
    rng, total = np.random.default_rng(seed), np.zeros((side, side, 3))
    cells = 4
    while cells <= side:
        noise = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), float)
        cells *= 2
    total = (total - total.min()) / (total.max() - total.min())
    return Image.fromarray((total * 255).astype(np.uint8))


def on_ground(things: int) -> Image.Image:
    """So many cut-outs on a flat ground."""
    ground = Image.new("RGB", (256, 256), (120, 160, 120))
    rng = np.random.default_rng(3)
    with Image.open(PICTURES / "panda.png") as panda:
        thing = panda.convert("RGB").resize((40, 40))
    for _ in range(things):
        ground.paste(thing, tuple(int(x) for x in rng.integers(0, 216, 2)))
    return ground


def cut_out(left=64, top=32, right=192, bottom=256) -> Decoded:
    alpha = np.zeros((256, 256), np.uint8)
    alpha[top:bottom, left:right] = 255
    return Decoded(textured(), alpha)


def encoded(picture: Image.Image, form="PNG", **options) -> Decoded:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return decode(buffer.getvalue(), "a picture")


def test_blur_and_enlargement_lower_sharpness_and_detail():
    sharp = textured()
    blurred = [Decoded(sharp.filter(ImageFilter.GaussianBlur(s))) for s in (1, 2, 4)]
    values = [arithmetic.sharpness(one) for one in (Decoded(sharp), *blurred)]
    assert values == sorted(values, reverse=True)
    assert values[0] > FILTERS["sharpness"].least > values[2]
    enlarged = Decoded(sharp.resize((64, 64), Image.Resampling.LANCZOS).resize((256, 256), Image.Resampling.BICUBIC))
    assert arithmetic.detail(Decoded(sharp)) > FILTERS["detail"].least > arithmetic.detail(enlarged)
    assert arithmetic.detail(blurred[1]) < FILTERS["detail"].least


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("pixels", Image.new("RGB", (768, 768)), Image.new("RGB", (767, 768))),
        ("aspect", Image.new("RGB", (300, 100)), Image.new("RGB", (301, 100))),
        ("exposure", Image.new("RGB", (64, 64), (90, 90, 90)), Image.new("RGB", (64, 64), (5, 5, 5))),
        ("exposure", Image.new("RGB", (64, 64), (90, 90, 90)), Image.new("RGB", (64, 64), (254, 254, 254))),
        ("contrast", textured(), Image.new("RGB", (64, 64), (90, 90, 90))),
        ("flat", textured(), Image.new("RGB", (64, 64), (90, 90, 90))),
    ],
)
def test_thresholds(name, good, bad):
    one = FILTERS[name]
    assert not one.reason(one.measure(Decoded(good)))
    assert one.reason(one.measure(Decoded(bad))).startswith(f"{name} ")


def test_bars_are_no_paper():
    film = Image.new("RGB", (256, 256))
    film.paste(textured().crop((0, 0, 256, 176)), (0, 40))
    assert arithmetic.border(Decoded(film)) == pytest.approx(80 / 256, abs=0.01)
    assert arithmetic.border(Decoded(film.transpose(Image.Transpose.ROTATE_90))) == pytest.approx(80 / 256, abs=0.01)
    product = Image.new("RGB", (256, 256), "white")
    product.paste(textured().crop((0, 0, 256, 176)), (0, 40))
    assert arithmetic.border(Decoded(product)) == 0
    assert arithmetic.border(Decoded(textured())) == 0


def test_outline_needs_transparency():
    assert arithmetic.occupancy(Decoded(textured())) is None
    assert arithmetic.inside(Decoded(textured())) is None
    assert arithmetic.occupancy(cut_out()) == pytest.approx(0.5 * 224 / 256, abs=1e-3)
    assert arithmetic.inside(cut_out()) == 1.0  # a portrait may end at the lower edge
    assert arithmetic.inside(cut_out(left=0)) == pytest.approx(1 - 224 / 768, abs=0.01)
    assert arithmetic.clutter(cut_out()) == {"edges": 0.0, "bits": 0.0}


def test_clutter_rises_with_things_and_not_with_light_or_compression():
    corpus = [on_ground(count) for count in range(0, 33, 2)]
    measured = [arithmetic.clutter(Decoded(one)) for one in corpus]
    calibration = Calibration((f"{i}", value) for i, value in enumerate(measured))
    ranks = [calibration.rank(value) for value in measured]
    assert ranks == sorted(ranks)
    assert ranks[0] < 0.1 < 0.9 < ranks[-1]
    middle = corpus[8]
    for factor in (0.9, 1.1):
        lit = middle.point(lambda value, f=factor: min(255, value * f))
        assert calibration.rank(arithmetic.clutter(Decoded(lit))) == pytest.approx(ranks[8], abs=0.07)
    for quality in (85, 95):
        again = calibration.rank(arithmetic.clutter(encoded(middle, "JPEG", quality=quality)))
        assert again == pytest.approx(ranks[8], abs=0.07)


def test_near_duplicates_by_outline_and_colour():
    seen = Duplicates()
    original = textured()
    seen.add(arithmetic.fingerprint(Decoded(original)), 7)
    same = encoded(original.resize((200, 200)), "JPEG", quality=60)
    bits, row = seen.nearest(arithmetic.fingerprint(same))
    assert bits < FILTERS["duplicates"].least
    assert row == 7
    red, green, blue = original.split()
    other_colours = Image.merge("RGB", (red.point(lambda v: v * 0.5), green, blue.point(lambda v: v * 0.6 + 90)))
    assert seen.nearest(arithmetic.fingerprint(Decoded(other_colours))) == (64, -1)
    assert seen.nearest(arithmetic.fingerprint(Decoded(textured(seed=1))))[0] >= FILTERS["duplicates"].least


def test_duplicates_grow_and_find_the_nearest():
    rng, seen = np.random.default_rng(0), Duplicates()
    hashes = rng.integers(0, 2**63, 3000)
    for row, one in enumerate(hashes):
        seen.add({"hash": f"{one:016x}", "colours": "80" * 48}, row)
    flipped = int(hashes[2500]) ^ 0b101
    assert seen.nearest({"hash": f"{flipped:016x}", "colours": "80" * 48}) == (2, 2500)


def test_a_threshold_above_the_usual_finds_farther_duplicates():
    values = [{"hash": f"{one:016x}", "colours": "80" * 48} for one in (0, 2**20 - 1)]
    verdicts = []
    for least in (5.0, 30.0):
        decisions = Decisions(chosen({"duplicates": FilterConfig(least=least)}, "filter"))
        for number, (name, value) in enumerate(zip("ab", values, strict=True)):
            decided = decisions.decide(row(id=name, row=number), {"duplicates": {name: value}})
        verdicts.append((decided["filters"]["duplicates"]["score"], decided["keep"]))
    assert verdicts == [(64.0, True), (20.0, False)]


def row(**extra):
    return {"row": 0, "id": "a", "subject": "person", "keep": True, "reason": "", **extra}


def test_a_filter_that_did_not_run_never_passes():
    filters = chosen({"flat": FilterConfig(), "quality": FilterConfig()}, "filter")
    decisions = Decisions(filters)
    undecided = decisions.decide(row(), {"flat": {"a": 0.2}, "quality": {}})
    assert undecided["keep"] is None
    assert undecided["reason"] == "quality not run: no judge is configured"
    assert undecided["filters"]["quality"] == {
        "score": None, "keep": None, "reason": undecided["reason"], "rank": "endpoint"
    }  # fmt: skip
    dropped = decisions.decide(row(), {"flat": {"a": 0.95}, "quality": {}})
    assert dropped["keep"] is False
    assert dropped["reason"] == "flat 0.95 is above 0.9"
    kept = decisions.decide(row(), {"flat": {"a": 0.2}, "quality": {"a": 75}})
    assert (kept["keep"], kept["reason"]) == (True, "")
    assert outcome({}) == {"keep": True, "reason": ""}


def test_unreadable_pictures_stay_dropped():
    bad = {**row(), "keep": False, "reason": "x.png is damaged"}
    assert Decisions(chosen({"flat": FilterConfig()}, "filter")).decide(bad, {"flat": {}}) is bad


def test_filters_of_the_other_stage_are_refused():
    with pytest.raises(CurateError, match=r"filter\.presence compares a target with its sources; move it to check"):
        chosen({"presence": FilterConfig()}, "filter")
    with pytest.raises(CurateError, match=r"check\.inside is for source pictures; move it to filter"):
        chosen({"inside": FilterConfig()}, "check")
    with pytest.raises(CurateError, match=r"filter\.sharp: there is no such filter; known: pixels"):
        chosen({"sharp": FilterConfig()}, "filter")


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"<svg/>", b"\xff\xd8\xff\xe0junk"]
)
def test_broken_pictures_have_one_sentence(data):
    with pytest.raises(UniPicError, match=r"^[^\n]*a\.png[^\n]*$"):
        decode(data, "a.png")
