"""Pictures that an evaluation finds again, and those that a judge is shown: damaged ones end nothing."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from trainers.judges.saved_pictures import PictureStore
from trainers.judges.vlm import AnswerError, load_picture


def test_a_damaged_picture_is_made_again(tmp_path):
    store = PictureStore(tmp_path, {"model": "a"})
    store.put(3, Image.new("RGB", (8, 8), "red"), 1.5)
    assert store.find(3)[1] == 1.5
    file = store.folder / "3.png"
    whole, gif = file.read_bytes(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    for content in (b"", whole[:40], gif.getvalue(), whole.replace(b"seconds", b"hours12")):
        file.write_bytes(content)
        assert store.find(3) is None
    store.put(3, Image.new("RGB", (8, 8), "red"), 2.5)
    assert store.find(3)[1] == 2.5


def test_a_judge_sees_pictures_as_the_model_does(tmp_path):
    """Damaged EXIF is left aside, dark 16-bit pictures have their brightness, transparent parts are white."""
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 9) + b"\x01\x12\0\x03\xff\xff\xff\xff"
    Image.new("RGB", (20, 10), "red").save(tmp_path / "exif.jpg", exif=exif)
    assert load_picture(tmp_path / "exif.jpg").size == (20, 10)
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_picture(tmp_path / "deep.png").image.getpixel((0, 0)) == (128, 128, 128)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png").image.getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(AnswerError, match="cannot be read as a picture"):
        load_picture(tmp_path / "eps.png")
