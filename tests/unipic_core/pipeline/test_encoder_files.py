"""A model folder from anyone: no code of it runs, nothing is fetched, damaged tokenizers are one sentence."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.data.text_embeddings import text_fingerprint
from unipic_core.errors import CheckpointError
from unipic_core.pipeline.text_encoder import TextEncoder
from unipic_core.weights.text_encoder import readable_encoder_errors


@pytest.fixture
def folder(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny encoder, for a user who answers "y" to every question."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    for part in ("text_encoder", "tokenizer", "processor"):
        shutil.copytree(golden / "tiny" / part, tmp_path / part)
    return tmp_path


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}))


def bring_code(folder: Path, part: str, config: str, kind: str) -> Path:
    """Python in a part, which its config asks to be loaded; returns the file that it writes when it runs."""
    mark = folder / "ran"
    (folder / part / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    edit(folder / part / config, auto_map={kind: ["evil.Evil", "evil.Evil"] if "Tokenizer" in kind else "evil.Evil"})
    return mark


@pytest.mark.parametrize(
    ("part", "config", "kind"),
    [
        ("tokenizer", "tokenizer_config.json", "AutoTokenizer"),
        ("text_encoder", "config.json", "AutoConfig"),
        ("processor", "preprocessor_config.json", "AutoImageProcessor"),
        ("processor", "processor_config.json", "AutoProcessor"),
        ("tokenizer", "config.json", "AutoConfig"),
    ],
)
@pytest.mark.parametrize("load", [TextEncoder.from_pretrained, text_fingerprint], ids=["encoder", "fingerprint"])
def test_code_of_a_folder_is_refused(folder: Path, part: str, config: str, kind: str, load: Any) -> None:
    mark = bring_code(folder, part, config, kind)
    edit(folder / part / config, tokenizer_class="Evil")
    with pytest.raises(CheckpointError, match=rf"{config} has the key auto_map: it asks to run Python code.*refused"):
        load(folder)
    assert not mark.exists()


def test_code_nested_in_a_config_is_refused(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", vision_config={"auto_map": {"AutoModel": "evil.Evil"}})
    with pytest.raises(CheckpointError, match="auto_map"):
        TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_implementation": "someone/kernels"}, "code from the Hugging Face hub"),
        ({"_attn_implementation": "someone/kernels:forward"}, "code from the Hugging Face hub"),
        ({"_attn_implementation_internal": {"text_config": "someone/kernels"}}, "code from the Hugging Face hub"),
        ({"text_config": {"attn_implementation": "kernels-community/flash-attn2"}}, "code from the Hugging Face hub"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized in a form|quantised in a form"),
        ({"transformers_weights": "../other.safetensors"}, "names a file outside the folder"),
    ],
)
def test_kernels_and_files_from_elsewhere_are_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    edit(folder / "text_encoder" / "config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_pretrained(folder)


def test_only_named_tokenizers(folder: Path) -> None:
    edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(CheckpointError, match=r"expected the tokenizer class Qwen2Tokenizer .* got 'LlamaTokenizer'"):
        TextEncoder.from_pretrained(folder)
    edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="Qwen2TokenizerFast")
    assert TextEncoder.from_pretrained(folder, torch.float32).prefix_ids


def test_an_adapter_does_not_replace_the_encoder(folder: Path) -> None:
    edit(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path="someone/model", peft_type="LORA")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, which takes the encoder's weights from another"):
        TextEncoder.from_pretrained(folder)


def test_every_index_stays_inside(folder: Path) -> None:
    """The one that transformers would read too, not only the one that comes first in our order."""
    part = folder / "text_encoder"
    shutil.copy(part / "model.safetensors", folder / "secret.safetensors")
    (part / "model.safetensors").rename(part / "diffusion_pytorch_model.safetensors")
    table = {"weight_map": {"model.visual.patch_embed.proj.weight": "../secret.safetensors"}, "metadata": {}}
    (part / "model.safetensors.index.json").write_text(json.dumps(table))
    whole = {"weight_map": {"x": "diffusion_pytorch_model.safetensors"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        TextEncoder.from_pretrained(folder)
    (part / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="outside its folder; refused"):
        TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"a": "\\ud800"', "\x00", "[1]"])
def test_damaged_configs(folder: Path, content: str) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize("load", [TextEncoder.from_pretrained, text_fingerprint], ids=["encoder", "fingerprint"])
def test_a_tokenizer_that_panics(folder: Path, load: Any) -> None:
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    edit(folder / "tokenizer" / "tokenizer.json", normalizer=broken)
    with pytest.raises(CheckpointError, match=r"the encoder in .* cannot be (loaded|read): .*fetch it again"):
        load(folder)


def test_a_panic_is_one_sentence_and_an_interrupt_is_none() -> None:
    import tokenizers

    broken = {"version": "1.0", "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    text = json.dumps({**broken, "model": {"type": "BPE", "vocab": {}, "merges": []}})
    with pytest.raises(CheckpointError, match="the tokenizer: Precompiled"), readable_encoder_errors("the tokenizer"):
        tokenizers.Tokenizer.from_str(text)
    with pytest.raises(KeyboardInterrupt), readable_encoder_errors("the tokenizer"):
        raise KeyboardInterrupt
