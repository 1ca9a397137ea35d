"""The command line: what it writes, exit codes, one readable line for every mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.paths import ROOT
from unipic_core.cli import commands as cli
from unipic_core.cli import compose as command
from unipic_core.cli.argument_types import lora_argument, size_argument
from unipic_core.cli.commands import main
from unipic_core.errors import UniPicError
from unipic_core.model.attention import PACKAGES, matmul_attention
from unipic_core.pipeline import pipeline
from unipic_core.weights.lora import save_lora

FAST = ["--size", "32x16", "--steps", "1", "--cfg", "1", "--reference-budget", "32", "--device", "cpu"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.new("RGB", (20, 10), "red").save(path)
    return path


@pytest.fixture
def loaded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny pipeline in place of loading one."""
    monkeypatch.setattr(command, "load_pipeline", lambda *_: tiny)
    return tiny


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def load(*_: Any) -> Any:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(command, "load_pipeline", load)


def compose(model: Path, *arguments: object) -> list[str]:
    return ["compose", "--prompt", "a cat", "--model", str(model), *FAST, *map(str, arguments)]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    try:
        got: Any = main(arguments)
    except SystemExit as stop:
        got = stop.code
    assert got == code
    lines = [
        x
        for x in capsys.readouterr().err.splitlines()
        if x and not x.startswith(("references", "loading", "composing"))
    ]
    assert len(lines) == 1, lines
    return lines[0]


def test_compose_writes_a_picture_that_says_how_it_was_made(golden: Path, picture: Path, capsys: Any) -> None:
    out = picture.with_name("out.png")
    assert main(compose(golden / "tiny", picture, "--out", out, "--seed", 7, "--sampler", "consistency")) == 0
    made = Image.open(out)
    assert made.size == (32, 16)
    record = json.loads(made.text["unipic"])
    assert (record["prompt"], record["seed"], record["images"], record["size"]) == ("a cat", 7, ["cat.png"], [32, 16])
    assert record["recipe"]["steps"] == 1
    assert record["recipe"]["sampler"] == "consistency"
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "composing" in said.err
    assert "Model config" not in said.err
    assert sorted(p.name for p in picture.parent.iterdir()) == ["cat.png", "out.png"]


def test_many_images(golden: Path, picture: Path, loaded: Any) -> None:
    out = picture.with_name("out.webp")
    assert main(compose(golden / "tiny", picture, "-o", out, "--num-images", 2, "--seed", 3)) == 0
    assert sorted(p.name for p in picture.parent.iterdir()) == ["cat.png", "out-3.webp", "out-4.webp"]


def test_no_pictures_warns(golden: Path, tmp_path: Path, loaded: Any, capsys: Any) -> None:
    assert main(compose(golden / "tiny", "--out", tmp_path / "a.jpg")) == 0
    assert "warning: no pictures given" in capsys.readouterr().err
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


def test_a_prompt_that_names_other_pictures_warns(golden: Path, picture: Path, loaded: Any, capsys: Any) -> None:
    out = picture.with_name("out.png")
    assert main(compose(golden / "tiny", picture, "--out", out, "--prompt", "image 5 on the beach")) == 0
    said = capsys.readouterr().err
    assert "warning: the prompt names image 5, and there is one picture" in said
    assert "warning: the prompt never names image 1" in said


def test_loras_are_loaded_with_their_strength(golden: Path, tmp_path: Path, tiny: Any, capsys: Any) -> None:
    down, up = torch.ones(2, 16), torch.ones(64, 2)
    save_lora(tmp_path / "a.safetensors", {"img_in": (down, up)})
    lora = f"{tmp_path / 'a.safetensors'}=0.5"
    args = cli.parser().parse_args(compose(golden / "tiny", "--lora", lora, "--lora", lora))
    loaded = command.load_pipeline(args, command.open_checked(args, [])).transformer.img_in.weight
    torch.testing.assert_close(loaded, tiny.transformer.img_in.weight + 2 * 0.5 * up @ down)
    assert "a.safetensors: 1 layers added at strength 0.5" in capsys.readouterr().err
    absent = tmp_path / "b.safetensors=0.5"
    assert "b.safetensors" in fails(compose(golden / "tiny", "--lora", absent), capsys).partition("=0.5")[0]


@pytest.mark.parametrize(
    ("asked", "name", "dtype"), [("auto", "fp32", torch.float32), ("bf16", "bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_cpu_of_any_name_computes_in_float32(device: str, asked: str, name: str, dtype: torch.dtype) -> None:
    args = cli.parser().parse_args(["compose", "-p", "a", "--device", device, "--dtype", asked])
    assert command.number_type(args) == (name, dtype)


def test_arguments(tmp_path: Path) -> None:
    assert size_argument("1024x768") == size_argument("1024X768") == (1024, 768)
    assert lora_argument("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert lora_argument("a.safetensors=-0.5") == (Path("a.safetensors"), -0.5)
    assert lora_argument("C:\\a.safetensors") == (Path("C:\\a.safetensors"), 1.0)
    assert lora_argument("a:2") == (Path("a:2"), 1.0)
    (tmp_path / "a=2").touch()
    assert lora_argument(str(tmp_path / "a=2")) == (tmp_path / "a=2", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["compose"], "required: --prompt"),
        (["paint"], "invalid choice"),
        (["compose", "--prompt", "a", "--size", "10"], "expected WIDTHxHEIGHT such as 1024x768, got '10'"),
        (["compose", "--prompt", "a", "--out", "a.bmp"], "should end in .png"),
        (["compose", "--prompt", "a", "--out", "absent/a.png"], "no folder absent"),
        (["compose", "--prompt", "a", "--seed", "x"], "invalid int value"),
        (["compose", "absent.png", "--prompt", "a"], "no such picture: absent.png"),
        (["info", "absent"], "no file or folder absent"),
        (["convert", "absent", "b.safetensors"], "no file or folder absent"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert message in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--size", "50x48"], "multiples of 16, got 50x48; use 48x48"),
        (["--size", "4096x4096"], "use 1024x1024"),
        (["--size=-16x16"], "output width must be positive whole pixels, got -16; try 1024x1024"),
        (["--steps", "0"], "steps must be from 1"),
        (["--num-images", "0"], "number of images must be from 1"),
        (["--cfg", "nan"], "guidance scale must be"),
        (["--prompt", "bad \udcff bytes"], "not valid Unicode: character 5 is U+DCFF, half of a surrogate pair"),
        (["--negative", "astronaut \ud83d"], "not valid Unicode: character 11 is U+D83D, half of a surrogate pair"),
        (["--sampler", "heun"], "sampler must be one of consistency, euler, got 'heun'"),
        (["--reference-budget", "8"], "reference budget must be from 32"),
        (["--device", "gpu"], "no device 'gpu'"),
        (["--attention", "fast"], "attention must be one of sdpa, matmul, flash, sage, got 'fast'"),
        (["--attention", "sage"], "pip install sageattention, or choose sdpa"),
        (["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--lora", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_wrong_wishes_are_found_before_loading(
    golden: Path,
    picture: Path,
    unloaded: None,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES["sage"].modules[0], None)
    out = picture.with_name("out.png")
    assert message in fails(compose(golden / "tiny", picture, "--out", out, *change), capsys)
    assert not out.exists()


def test_compiling_without_a_compiler(
    golden: Path, picture: Path, unloaded: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CXX", "absent++")
    assert "needs the C++ compiler absent++" in fails(compose(golden / "tiny", picture, "--compile"), capsys)


def test_attention_and_compile_reach_the_network(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(pipeline, "compile_blocks", compiled.append)
    args = cli.parser().parse_args(compose(golden / "tiny", "--attention", "matmul", "--compile"))
    network = command.load_pipeline(args, command.open_checked(args, [])).transformer
    assert network.attention is matmul_attention
    assert compiled == [network]


def test_a_prompt_too_long(golden: Path, picture: Path, loaded: Any, capsys: Any) -> None:
    assert "prompt is too long" in fails(compose(golden / "tiny", picture, "--prompt", "word " * 8000), capsys)


def test_seven_pictures(golden: Path, picture: Path, unloaded: None, capsys: Any) -> None:
    assert "at most 6 pictures can be composed, got 7" in fails(compose(golden / "tiny", *[picture] * 7), capsys)


def test_truncated_picture_and_wrong_model(golden: Path, picture: Path, capsys: Any) -> None:
    cut = picture.with_name("cut.png")
    cut.write_bytes(picture.read_bytes()[:50])
    assert "cut.png is damaged" in fails(compose(golden / "tiny", cut), capsys)
    assert "no model folder" in fails(compose(picture.parent / "absent", picture), capsys)
    assert "has no text_encoder/, tokenizer/, vae/; download" in fails(compose(picture.parent, picture), capsys)
    assert "no device 'gpu'" in fails(compose(golden / "tiny", picture, "--device", "gpu"), capsys)


def test_debug_shows_the_traceback(picture: Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        main(compose(picture.parent / "absent", picture, "--debug"))


@pytest.mark.parametrize("package", ["tqdm", "transformers"])
def test_an_absent_package_is_named_before_anything_is_loaded(
    golden: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, package: str
) -> None:
    monkeypatch.setattr(pipeline, "load_parts", pytest.fail)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    expected = f"unipic: this needs the package {package}, which is not installed; in the folder of this pack: pip "
    said = fails(compose(golden / "tiny", picture), capsys)
    assert said.startswith(expected)
    assert said.endswith('-e ".[pipeline]"')


def test_a_module_of_our_own_that_is_absent_is_unexpected(
    golden: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "unipic_core.weights.describe", None)
    assert "unexpected ModuleNotFoundError" in fails(["info", str(golden / "tiny")], capsys, code=1)


def test_unknown_weights_are_told_with_what_was_chosen(
    golden: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def said(model: Path, *more: str) -> str:
        main(["compose", str(picture), "-p", "a", "--model", str(model), "--size", "32x16", *more])
        return str(capsys.readouterr().err)

    def stop(*_: Any) -> None:
        raise UniPicError("far enough")

    monkeypatch.setattr(command, "load_pipeline", stop)
    tiny = golden / "tiny"
    text = (
        "warning: tiny has no recipe and its name is of no known kind, so it runs with 50 steps, euler, guidance 4; if "
    )
    assert text in said(tiny)
    assert "8 steps, euler, guidance 4" in said(tiny, "--steps", "8")
    assert "8 steps, euler, no guidance" not in said(tiny, "--steps", "8", "--cfg", "0")
    assert "has no recipe" not in said(tiny, "--sampler", "consistency")
    known = shutil.copytree(tiny, picture.parent / "UniPic-3-DMD")
    assert "has no recipe" not in said(known)


def test_each_picture_s_size_is_told_and_a_small_one_warned_of(
    golden: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def said(*more: str) -> tuple[str, Any]:
        main(["compose", str(large), str(picture), "-p", "a", "--model", str(golden / "tiny"), *more])
        return capsys.readouterr().err, opened[-1]

    def stop(args: Any, opened_now: Any) -> None:
        opened.append(opened_now)
        raise UniPicError("far enough")

    opened: list[Any] = []
    monkeypatch.setattr(command, "load_pipeline", stop)
    large = picture.with_name("large.png")
    Image.new("RGB", (600, 400), "blue").save(large)
    text, _ = said("--reference-budget", "512")
    assert "references: image 1 600x400 seen at 640x416, image 2 20x10 seen at 32x32\n" in text
    assert "warning: image 2 (20x10) is seen at 32x32, below 128x128, so its details are lost" in text
    text, now = said("--reference-budget", "512", "--share", "equal")
    assert "image 1 600x400 seen at 448x288, image 2 20x10 seen at 512x256\n" in text
    assert "details are lost" not in text
    assert now.plan.request.share == "equal"
    text, now = said("--reference-budget", "512", "--share", "equal", "--reference-weights", "3,1")
    assert "image 2 20x10 seen at 352x192" in text
    assert now.plan.request.reference_weights == [3.0, 1.0]
    assert "one weight for each of 2 pictures, got 1" in said("--reference-weights", "3")[0]


def test_a_schedule_may_be_chosen(golden: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def said(*more: str) -> str:
        main(["compose", str(picture), "-p", "a", "--model", str(known), "--size", "32x16", "--device", "cpu", *more])
        return str(capsys.readouterr().err)

    def stop(*_: Any, **__: Any) -> None:
        raise UniPicError("far enough")

    monkeypatch.setattr(pipeline.UniPicPipeline, "from_opened", stop)
    known = shutil.copytree(golden / "tiny", picture.parent / "UniPic-3-DMD")
    assert "8 steps, consistency, no guidance\n" in said()
    told = "8 steps, euler, no guidance, schedule few_step; the release's demo of few-step weights with euler has the"
    assert told in said("--sampler", "euler")
    assert "8 steps, euler, no guidance\n" in said("--sampler", "euler", "--schedule", "base")
    assert "no guidance, schedule fixed_shift 5\n" in said("--schedule", "fixed_shift", "--shift", "5")
    assert "a shift needs the schedule fixed_shift, got the schedule few_step" in said("--shift", "5")
    assert "the schedule must be one of few_step, base, fixed_shift, got 'karras'" in said("--schedule", "karras")


def test_unexpected_errors(golden: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(command, "load_pipeline", broken)
    assert "unexpected KeyError: 'surprise'" in fails(compose(golden / "tiny", picture), capsys, code=1)


def test_interrupted_while_writing(
    golden: Path, picture: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = picture.with_name("out.png")
    out.write_bytes(b"the picture of before")

    def interrupted(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert "interrupted" in fails(compose(golden / "tiny", picture, "--out", out, "--overwrite"), capsys, code=130)
    assert out.read_bytes() == b"the picture of before"
    assert sorted(p.name for p in picture.parent.iterdir()) == ["cat.png", "out.png"]


def test_full_disk(golden: Path, picture: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = picture.with_name("out.png")
    assert "out.png: No space left on device" in fails(compose(golden / "tiny", picture, "--out", out), capsys)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c(golden: Path, picture: Path) -> None:
    out = picture.with_name("out.png")
    command = compose(golden / "tiny", picture, "--out", out, "--steps", "1000")
    run = subprocess.Popen(
        [sys.executable, "-m", "unipic_core", *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    assert run.stderr is not None
    assert run.stderr.readline() == b"references: image 1 20x10 seen at 32x32\n"
    assert b"loading tiny on cpu" in run.stderr.readline()
    said = b""
    while not re.search(rb" [1-9]\d*/1000 ", said):  # it is sampling
        more = os.read(run.stderr.fileno(), 4096)
        assert more, said
        said += more
    run.send_signal(signal.SIGINT)
    said += run.communicate(timeout=120)[1]
    assert run.returncode == 130
    assert b"interrupted" in said
    assert b"Traceback" not in said
    assert sorted(p.name for p in picture.parent.iterdir()) == ["cat.png"]


def test_info(golden: Path, capsys: Any) -> None:
    assert main(["info", str(golden / "tiny")]) == 0
    assert "2 layers" in capsys.readouterr().out
    assert main(["info", str(golden / "tiny"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "pipeline"


def test_convert(golden: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "a.safetensors"
    assert main(["convert", str(golden / "tiny"), str(target), "--dtype", "fp8_scaled"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["info", str(target)]) == 0
    assert "float8_e4m3fn" in capsys.readouterr().out
    again = ["convert", str(golden / "tiny"), str(target)]
    size = target.stat().st_size
    message = "already exists; choose another name, or overwrite it with --overwrite"
    assert fails(again, capsys) == f"unipic: {target} {message}"
    assert target.stat().st_size == size
    assert main([*again, "--dtype", "fp32", "--overwrite"]) == 0
    assert target.stat().st_size > 2 * size
    capsys.readouterr()
    message = fails(["convert", str(golden / "tiny" / "vae"), str(target), "--overwrite"], capsys)
    assert "expected the config of a QwenImageTransformer2DModel, got one of a AutoencoderKLQwenImage" in message
    assert target.exists()
