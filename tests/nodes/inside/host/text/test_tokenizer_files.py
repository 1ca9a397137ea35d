"""Tokenizers that are damaged or bring code: one sentence, and ComfyUI's queue goes on."""

import json
import shutil

import pytest
from unipic_pack.nodes.host.text.tokenizer import Vocabulary
from unipic_pack.unipic_core.errors import CheckpointError


@pytest.fixture
def folder(golden, tmp_path):
    return shutil.copytree(golden / "tiny" / "tokenizer", tmp_path / "tokenizer")


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_panic_while_loading(folder):
    edit(folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be loaded: Precompiled.*fetch it again"):
        Vocabulary.read(folder)


def test_panic_while_reading_a_prompt(folder):
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0})
    words = Vocabulary.read(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot read this text; it is damaged"):
        words.ids("a cat")


def test_code_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(CheckpointError, match="has the key auto_map"):
        Vocabulary.read(folder)
