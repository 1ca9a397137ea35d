"""What the user chose is exported, LoRAs first; a full disk loses none of them, and says how much was needed."""

import errno
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.trainers.loop.loop_toy import Toy, config
from trainers.loop.checkpointing import TrainingError, newest_checkpoint
from trainers.loop.export import Export, check_space, write_exports
from trainers.loop.loop import train
from trainers.methods.sft import SFTTraining
from unipic_core.weights.lora import read_lora

ADAPTER = {"sft": {"train_text_encoder": False}, "network": {"adapter": {"rank": 2}}}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_only_what_is_chosen_is_exported(changed):
    config = changed(sections=ADAPTER, steps=1, export=["lora", "folder"])
    export = train(config, SFTTraining(config))
    assert {p.name for p in export.iterdir()} == {"unipic_sft.safetensors", "unipic_sft"}
    names = [e.name for e in SFTTraining(changed(sections=ADAPTER)).exports()]
    assert names == [f"unipic_sft{end}" for end in (".safetensors", "_raw.safetensors")] + [
        *("unipic_sft_merged.safetensors", "unipic_sft_raw_merged.safetensors", "unipic_sft", "unipic_sft_raw")
    ]
    whole = SFTTraining(changed(sections={"sft": {"train_text_encoder": False}}, export=["merged"]))
    assert [e.name for e in whole.exports()] == ["unipic_sft.safetensors"]


def test_sizes_are_those_of_the_files(changed):
    config = changed(sections=ADAPTER, steps=1)
    method = SFTTraining(config)
    folder = train(config, method)
    sizes = {e.name: e.size for e in method.exports()}
    written = (folder / "unipic_sft_merged.safetensors").stat().st_size
    assert sizes["unipic_sft_merged.safetensors"] == pytest.approx(written, rel=0.05)
    written = sum(p.stat().st_size for p in (folder / "unipic_sft").rglob("*") if p.is_file())
    assert sizes["unipic_sft"] == pytest.approx(written, rel=0.05)


def test_a_disk_that_is_full_at_the_export_has_the_loras(changed, monkeypatch):
    config = changed(sections=ADAPTER, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("unipic_core.weights.convert.write_safetensors", full)
        with pytest.raises(TrainingError, match=r"Exported so far: unipic_sft\.safetensors, unipic_sft_raw\.saf") as no:
            train(config, SFTTraining(config))
    assert "could not write" in str(no.value)
    needed = sum(e.size for e in SFTTraining(config).exports())
    assert f"The others need {needed / 1e9:.2f} GB" in str(no.value)
    export = Path(config.output) / "export"
    assert {p.name for p in export.iterdir()} == {"unipic_sft.safetensors", "unipic_sft_raw.safetensors"}
    assert read_lora(export / "unipic_sft.safetensors").ranks == (2,)
    assert len(list(train(config, SFTTraining(config)).iterdir())) == 6  # the same command again only exports


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_lora_of_the_step(changed, monkeypatch, tmp_path):
    config = changed(sections=ADAPTER, steps=4, save_every=2)
    save = torch.save

    def until_the_second(*args):
        return full() if newest_checkpoint(tmp_path / "run") else save(*args)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", until_the_second)
        with pytest.raises(TrainingError, match=r"A checkpoint needs [\d.]+ GB, and .* The student's LoRA") as no:
            train(config, SFTTraining(config))
    (lora,) = (tmp_path / "run" / "checkpoints" / "lora-of-step-0000004").iterdir()
    assert str(lora.parent) in str(no.value)
    assert read_lora(lora).ranks == (2,)
    assert newest_checkpoint(tmp_path / "run").name == "step-0000002"
    export = train(config, SFTTraining(config))
    assert (export / lora.name).read_bytes() == lora.read_bytes()


def test_a_full_disk_promises_no_lora_that_a_run_does_not_train(changed, monkeypatch, tmp_path):
    config = changed(sections={"sft": {"train_text_encoder": False}}, steps=2, save_every=2)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(TrainingError, match=r"A checkpoint needs [\d.]+ GB") as no:
        train(config, SFTTraining(config))
    assert "LoRA" not in str(no.value)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_earlier_exports_stay_and_are_named(tmp_path, capsys):
    def write(name):
        return Export(name, 0, lambda folder: (folder / name).write_text("new"))

    accelerator, folder = Accelerator(cpu=True), tmp_path / "export"
    write_exports(accelerator, [write("a"), write("b")], folder, together=False)
    (folder / "a").write_text("old")
    write_exports(accelerator, [write("a")], folder, together=False)
    assert (folder / "a").read_text() == "new"
    assert "files of earlier exports are kept" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]


def test_too_little_room_is_said_before_training(tmp_path, capsys):
    class Large(Toy):
        def exports(self):
            return [Export("ema.pt", 10**15, lambda folder: torch.save(self.ema, folder / "ema.pt"))]

    train(config(tmp_path, steps=1), Large())
    assert "warning: the export will need 1000000.00 GB" in capsys.readouterr().out
    check_space(Accelerator(cpu=True), [Export("x", 1, os.remove)], tmp_path)
    assert capsys.readouterr().out == ""
