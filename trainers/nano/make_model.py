"""`python -m trainers.nano --vae FOLDER --out FOLDER`: write an untrained unipic-nano in the released folder layout.

All parts are small and fit ComfyUI's VAE and text-encoder classes. The folder stays below 25 MB in bfloat16, with room
for a few-step LoRA.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from unipic_core.conditioning.prompt import prompt_text
from unipic_core.conditioning.vision import MEAN, STD
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.sampling.schedules import Shift
from unipic_core.weights.recipe import Recipe

from .emoji import Bank
from .scenes import corpus

NETWORK = MMDiTConfig(
    num_layers=6, num_attention_heads=5, attention_head_dim=32, joint_attention_dim=128, axes_dims_rope=(8, 12, 12)
)
VOCABULARY = 1024
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
RECIPE = Recipe(
    steps=20,
    guidance=1.0,
    sampler="euler",
    schedule="base",
    reference_budget=128,
    output_budget=128,
    time_rounding="none",
    made={"by": "trainers/recipes/nano"},
)
SHIFT = Shift()
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_image_seq_len": SHIFT.base_tokens,
    "max_image_seq_len": SHIFT.max_tokens,
    "base_shift": SHIFT.base_mu,
    "max_shift": SHIFT.max_mu,
    "shift_terminal": SHIFT.terminal,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "QwenImageEditPipeline",
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def make_tokenizer(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Any:
    """Train a byte-level BPE tokenizer like Qwen2's on `texts`; special tokens follow its vocabulary."""
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    alphabet = sorted(_byte_alphabet())
    size = vocabulary - len(SPECIAL_TOKENS)
    blank.train_from_iterator(texts, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(blank.to_str())["model"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in SPECIAL_TOKENS}
    vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    merges: Any = [tuple(m) for m in model["merges"]]
    return Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=list(SPECIAL_TOKENS[1:]))


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def captions(bank: Bank, count: int, seed: int) -> Iterator[str]:
    """Corpus of the tokenizer: instructions, some in the chat template, so that the template needs few tokens."""
    for i, instruction in enumerate(corpus(bank, count, seed)):
        yield prompt_text(instruction, 1 + i % 3) if i % 4 == 0 else instruction


def text_encoder_config(tokenizer: Any) -> Any:
    """Config of a small Qwen2.5-VL: 3 text layers of width 128, 2 vision layers of width 96."""
    from transformers import Qwen2_5_VLConfig

    make: Any = Qwen2_5_VLConfig
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    }
    return make(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        unipic_positions="multimodal",
    )


def init_network(network: MMDiT, generator: torch.Generator) -> None:
    """Initialise as DiT: Xavier, with zero modulations and last layer, so that every block starts as identity."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
            if name.endswith(("img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)


def write_folder(vae: Path, out: Path, seed: int, corpus_size: int = 20000) -> None:
    """Write the untrained pipeline folder."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    bank = Bank.open()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(captions(bank, corpus_size, seed))
    for folder in ("tokenizer", "processor"):
        tokenizer.save_pretrained(out / folder)
    write_json(out / "processor" / "preprocessor_config.json", image_processor_config())
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", MODEL_INDEX)
    (out / "recipe.json").write_text(RECIPE.to_json() + "\n", encoding="utf-8")
    torch.manual_seed(seed)
    Qwen2_5_VLForConditionalGeneration(text_encoder_config(tokenizer)).save_pretrained(out / "text_encoder")
    network = MMDiT(NETWORK)
    init_network(network, torch.Generator().manual_seed(seed))
    save_network(network, out / "transformer", torch.float32)
    shutil.copytree(vae, out / "vae", dirs_exist_ok=True)


def save_network(network: MMDiT, folder: Path, dtype: torch.dtype) -> None:
    """Write `transformer/` in diffusers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: w.detach().to(dtype).contiguous() for k, w in network.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", network.config.to_dict())


def image_processor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 3136, "longest_edge": 1003520},
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainers.nano.make_model", description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="the vae/ folder exported by trainers.train")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the initial weights (%(default)s)")
    args = parser.parse_args()
    write_folder(args.vae, args.out, args.seed)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
