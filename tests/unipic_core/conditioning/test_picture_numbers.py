"""Which pictures a prompt names, in the ways that people write it."""

from __future__ import annotations

import pytest

from unipic_core.conditioning.picture_numbers import named_pictures, number_cautions


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("Put the guitar from image 2 in the hands of the astronaut from image 1.", {1, 2}),
        ("Image_1 beside IMG 3 and photo #2", {1, 2, 3}),
        ("Blend images 1, 2 and 4", {1, 2, 4}),
        ("Blend pictures 1-3, softly", {1, 2, 3}),
        ("the people of images 2 to 4", {2, 3, 4}),
        ("Use image 1 and 2.", {1, 2}),
        ("Draw image 1 and 2 dogs", {1}),
        ("the hat of the second picture, the 3rd photo's light, and the last image", {2, 3, 4}),
        ("both images in one", {1, 2, 3, 4}),
        ("all four reference images", {1, 2, 3, 4}),
        ("把图2的吉他给图片1里的宇航员", {1, 2}),
        ("第三张图的帽子，图像４", {3, 4}),
        ("图二和第 1 张", {1, 2}),
        ("所有图片放在一起", {1, 2, 3, 4}),
        ("Blend them.", set()),
        ("a photo 1980 style, picture 1024x768, photo 35mm", set()),
        ("imagine 2 dogs", set()),
        ("", set()),
        ("image " + "5" * 5000 + ", 第" + "5" * 5000 + "张, images 1 and " + "5" * 5000, {1}),
    ],
)
def test_named_pictures(prompt: str, named: set[int]) -> None:
    assert named_pictures(prompt, 4) == named


@pytest.mark.parametrize(
    ("prompt", "count", "cautions"),
    [
        ("image 1 and image 2", 2, []),
        ("Blend them.", 3, []),
        ("image 5 on image 1 and image 2", 2, ["the prompt names image 5, and there are 2 pictures"]),
        ("image 1 on image 2", 1, ["the prompt names image 2, and there is one picture"]),
        ("image 1", 0, ["the prompt names image 1, and there is no picture"]),
        ("image 0 and image 1", 1, ["the prompt names image 0, and there is one picture"]),
        ("image 1 alone", 3, ["the prompt never names image 2 and image 3"]),
        (
            "image 3 on image 1",
            2,
            ["the prompt names image 3, and there are 2 pictures", "the prompt never names image 2"],
        ),
    ],
)
def test_cautions(prompt: str, count: int, cautions: list[str]) -> None:
    assert list(number_cautions(prompt, count)) == cautions
