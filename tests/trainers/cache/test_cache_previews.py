"""The previews that a cache keeps: of the composition set, of other data, of the user's own."""

from pathlib import Path

import numpy as np
import pytest

from tests.trainers.cache.small_sets import picture
from trainers.cache import build, read_preview
from trainers.config.run import ConfigError, PreviewConfig, PreviewSample
from trainers.data.sources import Compositions
from trainers.data.text_embeddings import encoder_fingerprint


def test_previews_of_the_composition_set(nano, text):
    rows = read_preview(nano, PreviewConfig(samples=3), encoder_fingerprint(text))
    scenes = [Compositions(nano, 0, 2, "train", 3)[i] for i in range(2)] + [Compositions(nano, 0, 1, "heldout", 4)[0]]
    assert [r.rows.prompts for r in rows] == [(s.prompt,) for s in scenes]
    for row, scene in zip(rows, scenes, strict=True):
        assert np.array_equal(np.asarray(row.truth), scene.target)
        assert row.references.size == (128, 128)
        assert (row.shape.height, row.shape.width) == (8, 8)
        assert len(row.rows.references) == len(row.rows.vision) == len(scene.references)
        assert row.rows.cond.embeds.shape[0] == row.rows.uncond.embeds.shape[0] == 1
    live = read_preview(nano, PreviewConfig(samples=3))
    assert live[0].rows.cond is None
    assert live[0].rows.vision
    with pytest.raises(ConfigError, match="not in .*run python -m trainers.cache"):
        read_preview(nano, PreviewConfig(samples=5))
    with pytest.raises(ConfigError, match="no text embeddings of this encoder"):
        read_preview(nano, PreviewConfig(samples=3), "0" * 12)


def test_previews_of_the_users_own(jsonl, vae, text, tmp_path):
    picture(tmp_path / "wide.png", (200, 100))
    picture(tmp_path / "tall.png", (50, 100))
    both = (str(tmp_path / "wide.png"), str(tmp_path / "tall.png"))
    preview = PreviewConfig(own=(PreviewSample(both, "the first with the second"), PreviewSample((), "words alone")))
    build(jsonl, vae, text, preview)
    name = encoder_fingerprint(text)
    wide, alone = read_preview(jsonl, preview, name)
    assert (wide.shape.width, wide.shape.height) == (8, 4)  # 2:1 at 96 x 96 is 136 x 68
    assert (alone.shape.width, alone.shape.height) == (6, 6)
    assert wide.truth.size == (128, 64)
    assert wide.truth.getextrema() == ((255, 255),) * 3
    assert len(wide.rows.references) == 2
    assert alone.rows.references == ()
    path = next(Path(jsonl.folder).glob("preview-*"))
    before = path.read_bytes()
    picture(tmp_path / "tall.png", (50, 100), seed=5)  # other pixels under the same name
    build(jsonl, vae, text, preview)
    assert path.read_bytes() != before
    assert len(read_preview(jsonl, preview, name)) == 2
    for images, prompt, message in [
        ((str(tmp_path / "none.png"),), "a", "no such picture"),
        (both * 4, "a", "references, got 8"),
        (both, " ", "no instruction"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(jsonl, vae, text, PreviewConfig(own=(PreviewSample(images, prompt),)))


def test_previews_of_other_data_are_its_first_good_rows(jsonl, vae, text):
    Path(jsonl.path).parent.joinpath("images/t0.png").unlink()
    whole = Path(jsonl.path).parent.joinpath("images/t1.png")
    whole.write_bytes(whole.read_bytes()[:-3000])
    build(jsonl, vae, text, PreviewConfig(samples=2))
    rows = read_preview(jsonl, PreviewConfig(samples=2), encoder_fingerprint(text))
    assert [r.rows.prompts for r in rows] == [("row 2",), ("row 3",)]
    assert rows[1].truth.size == (96, 64)
