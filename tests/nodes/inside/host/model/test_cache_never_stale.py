"""The nodes' cache of keys and values is never stale: after any change a run gives what it gives without the cache.

A run empties the cache of the run before, and its key holds all that may change within a run. Each case is run three
times: as it is; with a cache that survives its run and a key that forgot the change, which must be wrong; and for the
weights, which no key holds, with the surviving cache alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management as management
import pytest
import torch
from causal_tools import CAUSAL, build, close, conditioning
from model_tools import lora_file, random_inputs, velocity
from torch import Tensor
from unipic_pack.nodes.host.model import kv_cache, kv_memory
from unipic_pack.nodes.host.model.influences import INFLUENCES
from unipic_pack.nodes.host.model.inputs import NetworkInputs
from unipic_pack.nodes.host.model.kv_cache import APPROXIMATE, KVCache, with_kv_cache
from unipic_pack.nodes.lora import add_lora
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.conditioning.influence import Influence, Region
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.model.config import REFERENCES
from unipic_pack.unipic_core.run.kv_storage import StoredKeyValues

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")

DIFFERENT = 1e-3
Key = tuple[Any, list[Tensor]]


def run(model: Any, cache: str = "auto", dtype: str = "auto", **changes: Any) -> Tensor:
    _, text, references = random_inputs()
    text, references = changes.get("text", text), changes.get("references", references)
    latent: dict[str, Any] = {"samples": torch.zeros(changes.get("batch", 1), *changes.get("size", (16, 1, 8, 8)))}
    if "noise_mask" in changes:
        latent |= {"noise_mask": changes["noise_mask"], "samples": latent["samples"] + 0.1}
    positive, negative = conditioning(text, references), conditioning(text[:, :4] * -0.5, references)
    for _, extra in (*positive, *negative):
        extra.update({INFLUENCES: changes["influences"]} if "influences" in changes else {})
    arguments = (
        changes.get("seed", 3),
        changes.get("steps", 3),
        changes.get("cfg", 1.0),
        "consistency",
        1.0,
        cache,
        "auto",
        0.0,
        dtype,
    )
    return FewStepSampler.execute(model, positive, negative, latent, *arguments)[0]["samples"]


# --- keys that forget ---


def references(key: Any, tensors: list[Tensor]) -> Key:
    return key, tensors[1:]


def text(key: Any, tensors: list[Tensor]) -> Key:
    return key, tensors[:1]


def shapes(key: Any, tensors: list[Tensor]) -> Key:
    return key[0], tensors


def both(key: Any, tensors: list[Tensor]) -> Key:
    """Contents and shapes of the references."""
    return key[0], tensors[1:]


@dataclass(frozen=True)
class Case:
    """A change of the inputs or of the model. forget: the key that makes it stale; None = nothing in the key does.

    before: inputs before the change. text_only: only the form that caches the text depends on it. weights: only the
    emptying between runs protects.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    model: Callable[[Any], Any] = lambda model: model
    forget: Callable[[Any, list[Tensor]], Key] | None = None
    text_only: bool = False
    weights: bool = False

    def depends(self, form: str) -> bool:
        return (self.forget is not None or self.weights) and (form == "prefix_causal" or not self.text_only)


X, WORDS, PICTURES = random_inputs()
LORA = build(lora_file("transformer.{}.lora_{}.weight"))


@contextmanager
def rewritten(model: Any) -> Iterator[None]:
    """Weights written in place, without a trace."""
    weight = model.model.diffusion_model.transformer_blocks[0].attn.to_v.weight
    weight.data.mul_(-1)
    yield
    weight.data.mul_(-1)


def masked(picture: Tensor) -> Tensor:
    """As a mask of Reference leaves it: a part of the picture is white."""
    picture = picture.clone()
    picture[..., :3, :3] = 1.0
    return picture


LEFT, RIGHT = Region(0, 0, 500, 1000), Region(500, 0, 1000, 1000)


def influences(**first: Any) -> dict[str, Any]:
    """Inputs with an influence of the first reference."""
    return {"influences": (Influence(**first), Influence())}


CASES = {
    "picture": Case({"references": [PICTURES[0] + 0.1, PICTURES[1]]}, forget=references),
    "mask of a picture": Case({"references": [masked(PICTURES[0]), PICTURES[1]]}, forget=references),
    "size of a picture": Case({"references": [PICTURES[0].transpose(-1, -2), PICTURES[1]]}, forget=both),
    "order of references": Case({"references": [PICTURES[1], PICTURES[0]]}, forget=both),
    "prompt": Case({"text": WORDS.flip(-1)}, forget=text, text_only=True),
    "cond and uncond": Case({"cfg": 3.0}, forget=text, text_only=True),
    "size": Case({"size": (16, 1, 16, 12)}, forget=shapes, text_only=True),
    "seed and batch": Case({"seed": 4, "batch": 2}),
    "strength of a reference": Case(influences(strength=2.0), before=influences(strength=0.5)),
    "box of a reference": Case(influences(region=RIGHT), before=influences(region=LEFT)),
    "time range of a reference": Case(influences(strength=0.0, end=0.5), before=influences(strength=0.0)),
    "no strength": Case(before=influences(strength=0.5)),
    "mask of the latent": Case({"noise_mask": torch.ones(1, 8, 8).tril()}),
    "LoRA": Case(model=lambda model: add_lora(model, LORA, 1.0)[0], weights=True),
    "strength of a LoRA": Case(model=lambda model: add_lora(model, LORA, 0.5)[0], weights=True),
}


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("name", CASES)
def test_a_changed_run_is_that_without_the_cache(name: str, form: str, causal_models: dict[str, Any]) -> None:
    case, model = CASES[name], causal_models[form]
    before, changed = run(model, **case.before), case.model(model)
    got = run(changed, **case.inputs)
    close(got, run(changed, "off", **case.inputs))
    assert got.shape != before.shape or float((got - before).abs().max()) > DIFFERENT
    close(run(model, **case.before), before)


@pytest.fixture
def surviving(monkeypatch: pytest.MonkeyPatch, causal_models: dict[str, Any]) -> Iterator[None]:
    """Caches that are not emptied with their run."""
    monkeypatch.setattr(KVCache, "end_run", lambda self: setattr(self, "_patcher", None))
    yield
    monkeypatch.undo()
    for model in causal_models.values():
        model.model.diffusion_model.kv_cache.end_run()


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.forget or case.weights])
@pytest.mark.usefixtures("surviving")
def test_a_key_that_forgot_the_change_would_fail(
    name: str, form: str, causal_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES[name], causal_models[form]
    if not case.depends(form):
        pytest.skip("keys and values of this form do not depend on it")
    key = NetworkInputs.cache_key
    run(model)
    changed = case.model(model)
    expected = run(changed, "off", **case.inputs)
    if case.forget is not None:
        close(run(changed, **case.inputs), expected)  # the key alone protects
        for cache in model.model.diffusion_model.kv_cache.exact.values():
            cache.clear()
        forget = case.forget
        monkeypatch.setattr(NetworkInputs, "cache_key", lambda self, piece: forget(*key(self, piece)))
        run(model)
    try:
        got = run(changed, **case.inputs)
    except RuntimeError:
        return  # keys and values of another number of tokens: not silent
    assert float((got - expected).abs().max()) > DIFFERENT / 10


@pytest.mark.parametrize("form", CAUSAL)
def test_weights_rewritten_between_runs(form: str, causal_models: dict[str, Any]) -> None:
    model = causal_models[form]
    before = run(model)
    with rewritten(model):
        got = run(model)
        close(got, run(model, "off"))
    assert float((got - before).abs().max()) > DIFFERENT
    close(run(model), before)


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.usefixtures("surviving")
def test_weights_rewritten_would_be_stale_in_a_cache_that_survives(form: str, causal_models: dict[str, Any]) -> None:
    model = causal_models[form]
    run(model)
    with rewritten(model):
        assert float((run(model) - run(model, "off")).abs().max()) > DIFFERENT


@pytest.mark.parametrize("changed", ["strength of a reference", "box of a reference"])
def test_an_approximate_cache_is_not_reused_where_an_influence_begins_to_count(
    changed: str, nano_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the next step of the same run, as by a time range, at a time at which it would be reused."""
    x, *inputs = random_inputs()
    timed = {INFLUENCES: tuple((one, (1.0, 0.0)) for one in CASES[changed].inputs["influences"])}
    expected = velocity(nano_model, x, 0.65, *inputs, **timed)
    key, approximate = NetworkInputs.approximate_key, with_kv_cache(nano_model, APPROXIMATE)
    cache = approximate.model.diffusion_model.kv_cache

    def second_step() -> Tensor:
        cache.begin_run(approximate)
        velocity(approximate, x, 0.7, *inputs)
        result = velocity(approximate, x, 0.65, *inputs, **timed)
        cache.end_run()
        return result

    close(second_step(), expected)
    monkeypatch.setattr(NetworkInputs, "approximate_key", lambda self: key(replace(self, reference_bias=None)))
    assert float((second_step() - expected).abs().max()) > DIFFERENT


# --- places and numbers ---


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_every_place_gives_the_same_picture(form: str, cfg: float, causal_models: dict[str, Any]) -> None:
    model = causal_models[form]
    expected = run(model, "off", cfg=cfg)
    for place in ("auto", "gpu", "cpu"):
        close(run(model, place, cfg=cfg), expected)
        off = run(model, place, "int8", cfg=cfg) - expected
        assert 1e-4 < float(off.norm() / expected.norm()) < 0.1


def test_int8_of_the_approximate_cache(nano_model: Any) -> None:
    expected = run(nano_model, "approximate", steps=8)
    got = run(nano_model, "approximate", "int8", steps=8)
    assert 1e-6 < float((got - expected).norm() / expected.norm()) < 0.1


def test_unknown_names(nano_model: Any) -> None:
    for arguments, message in ((("disk",), "condition_cache must be one of auto, gpu, cpu, off, approximate"),
                               (("auto", "fp4"), "cache_dtype must be one of auto, int8, got 'fp4'")):  # fmt: skip
        with pytest.raises(UniPicError, match=message):
            run(nano_model, *arguments)


@pytest.mark.parametrize("place", ["auto", "gpu", "cpu"])
@pytest.mark.parametrize("form", CAUSAL)
def test_without_room_it_is_computed_again(
    form: str, place: str, causal_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model = causal_models[form]
    expected = run(model, "off")
    monkeypatch.setattr(kv_memory, "free_memory", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        close(run(model, place), expected)
    [line] = [r.message for r in caplog.records if r.message.startswith("UniPic:")]
    assert "need 0.0 GB, 0.0 GB are free beside the activations: they are computed again in every step" in line


@pytest.mark.parametrize("form", CAUSAL)
def test_out_of_memory_while_it_is_filled(
    form: str, causal_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The first failure ends the attempts of this run, not of the next."""
    model, attempts = causal_models[form], []
    expected, append = run(model, "off"), StoredKeyValues.append

    def full(self: Any, kv: Any) -> None:
        attempts.append(kv)
        raise management.OOM_EXCEPTION("no memory")

    monkeypatch.setattr(StoredKeyValues, "append", full)
    with caplog.at_level(logging.WARNING):
        close(run(model), expected)
    assert [r.message for r in caplog.records if r.message.startswith("UniPic:")] == [f"UniPic: {kv_cache.NO_ROOM}"]
    assert len(attempts) == 1
    monkeypatch.setattr(StoredKeyValues, "append", append)
    seen = []
    monkeypatch.setattr(KVCache, "end_run", lambda self: seen.append(len(self.exact[REFERENCES])))
    close(run(model), expected)
    assert seen[-1] == 1
