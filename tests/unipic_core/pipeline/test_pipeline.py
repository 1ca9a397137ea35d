"""The pipeline beyond parity: caches, seeds, guidance, outputs, memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unipic_core.small_runs import SMALL, picture
from unipic_core.caching import PictureCache
from unipic_core.errors import UniPicError
from unipic_core.pipeline import UniPicPipeline
from unipic_core.pipeline.offload import Placement, checked_device, readable_out_of_memory


@pytest.fixture
def calls(tiny: UniPicPipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of the networks; "pictures" counts what goes through the VAE's encoder."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, method: str, name: str, pictures: str | None = None) -> None:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            if pictures:
                counts[pictures] += len(args[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    counted(tiny.text_encoder, "encode", "text")
    counted(tiny.text_encoder.network.visual, "forward", "vision")
    counted(tiny.vae, "encode", "vae", "pictures")
    counted(tiny.transformer, "forward", "network")
    return counts


def test_a_second_seed_encodes_nothing_again(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    images = [picture(0), picture(1)]
    first = tiny(images, "a", **SMALL, seed=1).images
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 2, "network": 2}
    second = tiny([i.copy() for i in images], "a", **SMALL, seed=2).images
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 2, "network": 4}
    assert not torch.equal(first, second)
    assert torch.equal(tiny(images, "a", **SMALL, seed=1).images, first)


def test_caches_notice_what_changes(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    tiny([picture(0), picture(1)], "a", **SMALL)
    tiny([picture(0), picture(1)], "b", **SMALL)
    assert (calls["text"], calls["pictures"]) == (2, 2)
    tiny([picture(1), picture(0)], "b", **SMALL)  # the order counts for the text, not for the latents
    assert (calls["text"], calls["pictures"]) == (3, 2)
    tiny([picture(1), picture(0)], "b", **{**SMALL, "reference_budget": 96})
    assert (calls["text"], calls["pictures"]) == (4, 4)
    changed = picture(1)
    changed.putpixel((0, 0), (1, 2, 3))
    tiny([changed, picture(0)], "b", **SMALL)
    assert (calls["text"], calls["pictures"]) == (5, 5)
    assert calls["vision"] == 4  # every change but that of the prompt
    for module, part in ((tiny.text_encoder.network, "text"), (tiny.vae.model, "pictures")):
        before, weight = calls[part], next(module.parameters())
        weight.mul_(1.0)  # an optimizer step in place
        tiny([changed, picture(0)], "b", **SMALL)
        assert calls[part] > before


def test_guidance_one_runs_and_encodes_no_unconditional(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    tiny([picture()], "a", negative_prompt="<|im_end|> would be refused if it were read", **SMALL)
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 1, "network": 2}
    tiny([picture()], "a", **{**SMALL, "true_cfg_scale": 2.0})
    assert calls == {"text": 2, "vision": 1, "vae": 1, "pictures": 1, "network": 6}


def test_prompt_and_negative_prompt_share_the_vision_tower(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    tiny([picture(0), picture(1)], "a", **{**SMALL, "true_cfg_scale": 2.0})
    assert (calls["text"], calls["vision"]) == (2, 1)
    tiny([picture(0), picture(1)], "another", **{**SMALL, "true_cfg_scale": 2.0})
    assert (calls["text"], calls["vision"]) == (3, 1)
    with pytest.warns(UserWarning, match="no pictures given"):
        tiny([], "a", **SMALL)
    assert (calls["text"], calls["vision"]) == (4, 1)


def test_references_of_one_size_go_through_the_vae_together(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    pictures = [picture(0, 64, 32), picture(1, 32, 32), picture(2, 64, 32), picture(0, 64, 32)]
    known = tiny._encode_references([picture(1, 32, 32)])[0]
    together = tiny._encode_references(pictures)
    assert (calls["vae"], calls["pictures"]) == (2, 3)  # the second is known and the fourth is the first
    assert together[1] is known
    tiny.clear_cache()
    for latent, reference in zip(together, pictures, strict=True):
        torch.testing.assert_close(latent, tiny._encode_references([reference])[0], rtol=0, atol=1e-5)
    assert tiny._encode_references([]) == []


def test_a_full_cache_keeps_what_is_asked_for(tiny: UniPicPipeline, calls: Counter[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny, "_reference_cache", PictureCache(2))
    old, *new = (picture(i, 32, 32) for i in range(3))
    first = tiny._encode_references([old])[0]
    assert tiny._encode_references([*new, old])[-1] is first
    assert calls["pictures"] == 3


def test_image_i_of_many_is_what_its_seed_gives_alone(tiny: UniPicPipeline) -> None:
    out = tiny([picture()], "a", **SMALL, seed=5, num_images=3)
    assert out.images.shape == (3, 12, 16)
    assert out.seeds == [5, 6, 7]
    for image, seed in zip(out.images, out.seeds, strict=True):
        alone = tiny([picture()], "a", **SMALL, seed=seed).images[0]
        torch.testing.assert_close(image, alone, rtol=1e-4, atol=1e-4)


def test_outputs(tiny: UniPicPipeline) -> None:
    small = {**SMALL, "width": 32, "height": 16}
    as_images = tiny([picture()], "a", **{**small, "output_type": "pil"}, num_images=2).images
    assert [i.size for i in as_images] == [(32, 16)] * 2
    assert tiny([picture()], "a", **{**small, "output_type": "pt"}).images.shape == (1, 3, 16, 32)
    assert tiny(picture(), "a", **small).images.shape == (1, 2, 16)  # one picture needs no list


def test_bfloat16_samples_in_float32(golden: Path) -> None:
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", device="cpu")
    seen: list[torch.dtype] = []
    out = pipe([picture()], "a", **SMALL, callback=lambda step, t, x_t, x0: seen.extend([x_t.dtype, x0.dtype]))
    assert pipe.transformer.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}
    assert out.images.dtype == torch.float32
    with pytest.raises(UniPicError, match="float16"):
        UniPicPipeline.from_pretrained(golden / "tiny", device="cpu", torch_dtype=torch.float16)


def test_no_references(tiny: UniPicPipeline) -> None:
    with pytest.warns(UserWarning, match="no pictures given"):
        out = tiny([], "a", **{**SMALL, "width": None, "height": 32})
    assert out.images.shape == (1, 4, 16)


# --- memory ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(golden: Path) -> None:
    with pytest.raises(UniPicError, match='pass device="cpu"'):
        UniPicPipeline.from_pretrained(golden / "tiny")
    with pytest.raises(UniPicError, match="no device 'gpu'"):
        checked_device("gpu")


def test_only_the_part_in_use_is_on_the_device() -> None:
    class Part:
        place = "cpu"

        def to(self, device: Any) -> None:
            self.place = str(device)

    parts = {"a": Part(), "b": Part()}
    for offload, other in ((True, "cpu"), (False, "meta")):
        placement = Placement(torch.device("meta"), offload)
        for name in ("a", "b"):
            assert placement.place(parts, name).place == "meta"
        assert parts["a"].place == other


def test_offloading_keeps_the_caches(tiny: UniPicPipeline, calls: Counter[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny.placement, "offload", True)
    moved: list[str] = []

    def moving(name: str, module: torch.nn.Module) -> Any:
        def to(device: Any) -> None:
            moved.append(name)
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()  # as a move to another device gives it another place

        return to

    for name, module in (("transformer", tiny.transformer), ("text_encoder", tiny.text_encoder.network)):
        monkeypatch.setattr(getattr(tiny, name), "to", moving(name, module))
    monkeypatch.setattr(tiny.vae, "to", moving("vae", tiny.vae.model))
    tiny([picture()], "a", **SMALL)
    assert set(moved) == {"transformer", "text_encoder", "vae"}
    tiny([picture()], "a", **SMALL, seed=3)
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 1, "network": 4}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_out_of_memory_says_what_to_lower(tiny: UniPicPipeline, monkeypatch: Any, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(tiny.transformer, "forward", fail)
    message = r"out of memory; lower the output size \(now 64x48\), or the reference budget \(now 64\)"
    with pytest.raises(UniPicError, match=message):
        tiny([picture()], "a", **SMALL)
    with pytest.raises(UniPicError, match=r"or the number of images \(now 2\)"):
        tiny([picture()], "a", **SMALL, num_images=2)


def test_other_runtime_errors_are_not_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), readable_out_of_memory("x"):
        raise RuntimeError("shapes do not match")


def test_shares_and_weights_reach_the_references(tiny: UniPicPipeline) -> None:
    images = [picture(0, 96, 64), picture(1, 32, 32)]
    wishes = {**SMALL, "reference_budget": 128}
    plain = tiny(images, "a", **wishes).images
    assert torch.equal(tiny(images, "a", **wishes, reference_weights=[2, 2]).images, plain)
    for other in ({"share": "equal"}, {"reference_weights": [1, 9]}):
        assert not torch.equal(tiny(images, "a", **wishes, **other).images, plain)
    with pytest.raises(UniPicError, match="one weight for each of 2 pictures, got 1"):
        tiny(images, "a", **wishes, reference_weights=[2])


def test_a_schedule_may_be_chosen(tiny: UniPicPipeline) -> None:
    times: list[float] = []
    wishes = {**SMALL, "num_inference_steps": 4}
    tiny([picture()], "a", **wishes, schedule="fixed_shift", shift=3.0, callback=lambda _, t, *__: times.append(t))
    assert times == pytest.approx([0.9, 0.75, 0.5, 0.0])
