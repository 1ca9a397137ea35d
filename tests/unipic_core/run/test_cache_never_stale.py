"""The cache of keys and values is never stale: after any change a run gives what it gives without the cache.

Each case is run twice: with the real key, and with a key that forgets the changed input. The second run must be wrong,
so a case whose input the real key forgot would fail.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from unipic_core.caching import WeightsKey
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.influence import Influence, Region
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.errors import UniPicError
from unipic_core.model.attention import scaled_dot_product_attention
from unipic_core.model.config import REFERENCES, TEXT
from unipic_core.pipeline import UniPicPipeline
from unipic_core.run.kv_cache import CacheKey, KVCache
from unipic_core.run.kv_storage import CacheStorage
from unipic_core.weights.lora import save_lora

FORMS = ("reference_causal", "prefix_causal")
RED, BLUE = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")
BASE: dict[str, Any] = {
    "images": [RED, BLUE],
    "prompt": "a cup",
    "seed": 1,
    "num_inference_steps": 1,
    "reference_budget": 64,
    "width": 64,
    "height": 48,
    "true_cfg_scale": 1.0,
    "output_type": "latent",
}
SAME, STALE = 1e-5, 1e-3
LAYER = "transformer_blocks.0.attn.to_v"

Forget = Callable[[CacheKey, dict[str, list[Tensor]]], tuple[CacheKey, dict[str, list[Tensor]]]]
Change = Callable[[UniPicPipeline], AbstractContextManager[tuple[UniPicPipeline, Mapping[str, Any]]]]


def written(form: str, folder: Path) -> Path:
    """The nano's weights in another form: noise for a picture, but the same arithmetic."""
    shutil.copytree(DEFAULT_MODEL, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_form": form}))
    return folder


def loaded(folder: Path) -> UniPicPipeline:
    return UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(request.param, tmp_path_factory.mktemp("models") / request.param)


FILES: dict[str, Path] = {}
"""The files that changes write to or read: the model's "folder", and a "lora"."""


@pytest.fixture(scope="module")
def shared(folder: Path) -> UniPicPipeline:
    generator = torch.Generator().manual_seed(0)
    pairs = {LAYER: (torch.randn(2, 160, generator=generator), torch.randn(160, 2, generator=generator))}
    FILES.update(folder=folder, lora=folder.parent / "some.safetensors")
    save_lora(FILES["lora"], pairs)
    return loaded(folder)


@pytest.fixture
def pipe(shared: UniPicPipeline) -> Iterator[UniPicPipeline]:
    yield shared
    shared._kv_cache = KVCache()


def run(pipe: UniPicPipeline, **changes: Any) -> Tensor:
    result: Tensor = pipe(**{**BASE, **changes}).images
    return result


def uncached(pipe: UniPicPipeline, **changes: Any) -> Tensor:
    kept, pipe._kv_cache = pipe._kv_cache, KVCache(CacheStorage("off"))
    try:
        return run(pipe, **changes)
    finally:
        pipe._kv_cache = kept


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- forgetful keys ---


def without(name: str) -> Forget:
    return lambda key, tensors: (key._replace(**{name: None}), tensors)


def references(key: CacheKey, tensors: dict[str, list[Tensor]]) -> tuple[CacheKey, dict[str, list[Tensor]]]:
    """Their contents and their shapes."""
    key, tensors = picture(key, tensors)
    return key._replace(references=(LatentShape(1, 0, 0),)), tensors


def picture(key: CacheKey, tensors: dict[str, list[Tensor]]) -> tuple[CacheKey, dict[str, list[Tensor]]]:
    return key, {REFERENCES: [], TEXT: tensors[TEXT][1:]}


def text(key: CacheKey, tensors: dict[str, list[Tensor]]) -> tuple[CacheKey, dict[str, list[Tensor]]]:
    return key, {**tensors, TEXT: tensors[TEXT][:1]}


class Traceless:
    """WeightsKey without the checksum, which alone notices writes that leave no trace."""

    def __new__(cls, module: Any, sampled: bool = False) -> Any:
        return WeightsKey(module)


# --- changes ---


def of(**changes: Any) -> Change:
    @contextmanager
    def change(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
        yield pipe, changes

    return change


@contextmanager
def lora(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
    pipe.load_lora(FILES["lora"], 1.0)
    yield pipe, {}
    pipe.load_lora(FILES["lora"], -1.0)


@contextmanager
def lora_strength(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
    pipe.load_lora(FILES["lora"], 1.0)
    run(pipe)
    pipe.load_lora(FILES["lora"], -0.5)
    yield pipe, {}
    pipe.load_lora(FILES["lora"], -0.5)


def written_in_place(write: Callable[[torch.nn.Parameter], object]) -> Change:
    @contextmanager
    def change(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
        weight = pipe.transformer.get_parameter(f"{LAYER}.weight")
        before = weight.detach().clone()
        with torch.no_grad():
            write(weight)
        yield pipe, {}
        with torch.no_grad():
            weight.copy_(before)

    return change


@contextmanager
def rewritten_on_disk(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
    """Another pipeline from the same file with other weights, with the first one's cache."""
    [file] = (FILES["folder"] / "transformer").glob("*.safetensors")
    before = file.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[f"{LAYER}.weight"] *= -1
    file.write_bytes(save(tensors, read_metadata(file)))
    try:
        other = loaded(FILES["folder"])
    finally:
        file.write_bytes(before)
    other._kv_cache = pipe._kv_cache
    yield other, {}


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


@contextmanager
def other_attention(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
    def halved(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask) / 2

    pipe.transformer.attention = halved
    yield pipe, {}
    pipe.transformer.attention = scaled_dot_product_attention


@contextmanager
def other_config(pipe: UniPicPipeline) -> Iterator[tuple[UniPicPipeline, Mapping[str, Any]]]:
    config = pipe.transformer.config
    pipe.transformer.config = replace(config, use_layer3d_rope=not config.use_layer3d_rope)
    yield pipe, {}
    pipe.transformer.config = config


@dataclass(frozen=True)
class Case:
    """A change, and the forgetful key that makes it stale: for both forms, or where the text is cached too.

    None: the keys and values do not depend on the change, and are rightly reused. before: arguments before the change.
    """

    change: Change
    forget: Forget | None
    text_only: bool = False
    before: Mapping[str, Any] = field(default_factory=dict)

    def forgetful(self, form: str) -> Forget | None:
        return None if self.text_only and form == "reference_causal" else self.forget


def one_pixel() -> Image.Image:
    changed = RED.copy()
    changed.paste((0, 255, 0), (8, 8, 24, 24))
    return changed


LEFT, RIGHT = Region(0, 0, 500, 1000), Region(500, 0, 1000, 1000)


def influence(**first: Any) -> dict[str, Any]:
    """Arguments with an influence of the first reference, in two steps."""
    return {"influences": [Influence(**first), Influence()], "num_inference_steps": 2}


CASES = {
    "picture": Case(of(images=[one_pixel(), BLUE]), picture),
    "order of references": Case(of(images=[BLUE, RED]), picture),
    "number of references": Case(of(images=[RED]), references),
    "size of references": Case(of(images=[RED.resize((48, 64)), BLUE]), references),
    "prompt": Case(of(prompt="a hat"), text, text_only=True),
    "cond and uncond": Case(of(true_cfg_scale=3.0), text, text_only=True),
    "size": Case(of(width=128, height=64), without("text_start"), text_only=True),
    "seed and batch": Case(of(seed=5, num_images=2), None),
    "steps and sampler": Case(of(num_inference_steps=2, sampler="consistency"), None),
    "strength of a reference": Case(of(**influence(strength=2.0)), None, before=influence(strength=0.5)),
    "box of a reference": Case(of(**influence(region=RIGHT)), None, before=influence(region=LEFT)),
    "time range of a reference": Case(of(**influence(strength=0.0, end=0.5)), None, before=influence(strength=0.0)),
    "LoRA": Case(lora, without("weights")),
    "strength of a LoRA": Case(lora_strength, without("weights")),
    "weights rewritten on disk": Case(rewritten_on_disk, without("weights")),
    "weights rewritten in place": Case(written_in_place(lambda w: w.mul_(-1)), without("weights")),
    "weights rewritten without a trace": Case(written_in_place(lambda w: w.data.mul_(-1)), without("weights")),
    "attention function": Case(other_attention, without("attention")),
    "config": Case(other_config, without("config")),
}


class Hits:
    """Counts the prefills of a pipeline's network."""

    def __init__(self, pipe: UniPicPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefills = 0
        original = pipe.transformer.prefill

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.prefills += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(pipe.transformer, "prefill", watched)


@pytest.mark.parametrize("name", CASES)
def test_a_changed_run_is_that_without_the_cache(
    name: str, pipe: UniPicPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, form = CASES[name], pipe.transformer.config.attention_form
    before = run(pipe, **case.before)
    with case.change(pipe) as (changed, arguments):
        hits = Hits(changed, monkeypatch)
        got = run(changed, **arguments)
        expected = uncached(changed, **arguments)
        assert distance(got, expected) < SAME
        assert got.shape != before.shape or distance(got, before) > STALE, "the change does not change the picture"
        assert (hits.prefills == 0) == (case.forgetful(form) is None)
    assert distance(run(pipe, **case.before), before) < 1e-4, "and back"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.forget])
def test_a_key_that_forgot_the_change_would_fail(
    name: str, pipe: UniPicPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    forget = case.forgetful(pipe.transformer.config.attention_form)
    if forget is None:
        pytest.skip("keys and values of this form do not depend on it")
    key = KVCache.key
    monkeypatch.setattr(KVCache, "key", lambda self, *inputs: forget(*key(self, *inputs)))
    monkeypatch.setattr(KVCache, "clear", lambda self: None)  # load_lora clears too
    run(pipe)
    with case.change(pipe) as (changed, arguments):
        expected = uncached(changed, **arguments)
        try:
            got = run(changed, **arguments)
        except RuntimeError:
            return  # keys and values of another number of tokens: not silent
        assert distance(got, expected) > STALE / 10


def test_every_part_of_the_key_has_a_case() -> None:
    probe = CacheKey(*(object() for _ in CacheKey._fields))  # type: ignore[arg-type]
    forgotten = set()
    for case in CASES.values():
        if case.forget is not None:
            key, _ = case.forget(probe, {REFERENCES: [], TEXT: []})
            forgotten |= {name for name in CacheKey._fields if getattr(key, name) is not getattr(probe, name)}
    assert forgotten | {"storage", "dtype"} == set(CacheKey._fields), "storage and dtype: below"


@pytest.mark.parametrize("inference", [False, True])
def test_writes_without_a_trace_need_the_checksum(
    inference: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `.data`, and to inference tensors, whose version PyTorch does not count."""
    with torch.inference_mode(inference):
        for key, stale in ((WeightsKey, False), (Traceless, True)):
            pipe = loaded(folder)
            monkeypatch.setattr("unipic_core.run.kv_cache.WeightsKey", key)
            run(pipe)
            pipe.transformer.get_parameter(f"{LAYER}.weight").data.mul_(-1)
            assert (distance(run(pipe), uncached(pipe)) > STALE) == stale


def test_another_storage_or_dtype_is_another_entry(pipe: UniPicPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    key = KVCache.key
    for forgets in (False, True):
        pipe._kv_cache = KVCache(CacheStorage("auto", "int8"))
        if forgets:
            monkeypatch.setattr(KVCache, "key", lambda self, *inputs: without("storage")(*key(self, *inputs)))
        run(pipe)
        pipe.cache_storage = CacheStorage("auto", "auto")
        assert (distance(run(pipe), uncached(pipe)) < SAME) != forgets
    network = pipe.transformer
    latents = pack_with_references(torch.zeros(1, 12, 64), LatentShape.of_pixels(64, 48), [[]])
    words = TextCond(torch.zeros(1, 3, network.config.joint_attention_dim))
    before, _ = key(pipe._kv_cache, network, latents, words)
    monkeypatch.setattr(network, "compute_dtype", torch.float64)
    assert key(pipe._kv_cache, network, latents, words)[0] != before


def test_the_mask_of_the_text_and_the_shape_of_a_reference(pipe: UniPicPipeline) -> None:
    """Two inputs that the pipeline never changes alone: the same tokens in another shape, the same words padded."""
    network, cache = pipe.transformer, pipe._kv_cache
    generator = torch.Generator().manual_seed(2)
    words = torch.randn(1, 6, network.config.joint_attention_dim, generator=generator)
    target, reference = torch.randn(2, 1, 12, 64, generator=generator)
    padded = torch.tensor([[1, 1, 1, 1, 0, 0]])
    seen: list[Tensor] = []
    with torch.no_grad():
        for shape, mask in (((3, 4), None), ((4, 3), None), ((3, 4), padded), ((3, 4), None)):
            latents = pack_with_references(target, LatentShape(1, 3, 4), [[]])
            shapes = ((latents.shapes[0][0], LatentShape(1, *shape)),)
            latents = replace(latents, tokens=torch.cat([target, reference], dim=1), shapes=shapes)
            condition = TextCond(words, mask)
            got = network(latents, 0.5, condition, cache=cache.get(network, latents, condition))
            assert distance(got, network(latents, 0.5, condition)) < SAME
            seen.append(got)
    assert distance(seen[0], seen[1]) > SAME < distance(seen[0], seen[2])
    assert distance(seen[0], seen[3]) < SAME


# --- where there is no room ---


@pytest.mark.parametrize("storage", [CacheStorage(), CacheStorage("gpu"), CacheStorage("cpu"), CacheStorage("off")])
def test_without_room_it_is_computed_again(
    storage: CacheStorage, pipe: UniPicPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(pipe)
    pipe._kv_cache = KVCache(storage, free=lambda device: 1000)
    hits = Hits(pipe, monkeypatch)
    if storage.place == "off":
        got = run(pipe)
    else:
        with pytest.warns(UserWarning, match="are free beside the activations: they are computed again in every step"):
            got = run(pipe)
    assert hits.prefills == 0
    assert distance(got, expected) < SAME


def test_out_of_memory_while_it_is_filled(pipe: UniPicPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(pipe)
    pipe._kv_cache = KVCache()

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.transformer, "prefill", full)
    with pytest.warns(UserWarning, match="computed again in every step"):
        got = run(pipe)
    assert distance(got, expected) < SAME


GPU, MAIN = torch.device("cuda"), torch.device("cpu")
GIB = 2**30


@pytest.mark.parametrize(
    ("place", "size", "gpu", "main", "chosen"),
    [
        ("auto", 3, 10, 10, "gpu"),
        ("auto", 3, 4, 64, "cpu"),  # less than half of 4 GiB would be left
        ("auto", 3, 4, 4, "off"),
        ("gpu", 3, 4, 64, "off"),
        ("cpu", 3, 80, 64, "cpu"),
        ("cpu", 3, 80, 4, "off"),
        ("off", 0, 80, 64, "off"),
        ("auto", 7, 12, 64, "gpu"),  # 5 GiB are left for activations
    ],
)
def test_places(place: str, size: int, gpu: int, main: int, chosen: str) -> None:
    free = {GPU: gpu * GIB, MAIN: main * GIB}
    assert CacheStorage(place).resolve(size * GIB, GPU, free.__getitem__) == chosen


@pytest.mark.parametrize(
    ("storage", "remedies"),
    [
        (CacheStorage(), "use a smaller reference budget, or cache_dtype int8"),
        (CacheStorage("gpu"), "use a smaller reference budget, or condition_cache cpu, or cache_dtype int8"),
        (CacheStorage("gpu", "int8"), "use a smaller reference budget, or condition_cache cpu"),
        (CacheStorage("cpu", "int8"), "use a smaller reference budget"),
    ],
)
def test_the_sentence_says_what_may_be_taken_and_what_helps(storage: CacheStorage, remedies: str) -> None:
    """Of 24 GiB 4 stay free for activations, so 22 GB do not fit."""
    sentence = storage.no_room(22 * 10**9, GPU, lambda device: 24 * GIB)
    assert "condition need 22.0 GB, 21.5 GB are free beside the activations: they are computed again" in sentence
    assert sentence.endswith(f"which is slower; {remedies}")


def test_unknown_names() -> None:
    with pytest.raises(UniPicError, match="condition_cache must be one of auto, gpu, cpu, off, got 'disk'"):
        CacheStorage("disk")
    with pytest.raises(UniPicError, match="cache_dtype must be one of auto, int8, got 'fp4'"):
        CacheStorage(dtype="fp4")
