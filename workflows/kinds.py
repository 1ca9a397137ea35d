"""The node types that the workflows use; a test inside ComfyUI compares them with the nodes themselves."""

from __future__ import annotations

from .graph import CONTROL, Kind

PREVIEW = 210
"""Pixels that a node grows by when its preview appears."""

KINDS = {
    "LoadUniPic": Kind(
        {},
        ("model", "text_encoder", "vae", "weight_dtype"),
        {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"},
        (300, 214),
        ours=True,
    ),
    "UniPicSampleImages": Kind({}, ("picture",), {"image": "IMAGE"}, (300, 112 + PREVIEW), ours=True),
    "MultiImageCompose": Kind(
        {"clip": "CLIP", "vae": "VAE", "model": "MODEL"},
        (
            "prompt",
            "negative_prompt",
            "width",
            "height",
            "batch_size",
            "reference_budget",
            "batches",
            "share",
            "size",
            "boxes",
        ),
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "sheet": "IMAGE"},
        (420, 620 + PREVIEW),
        frozenset({"model"}),
        growing={
            "images.image_": ("IMAGE", 6),
            "masks.mask_": ("MASK", 6),
            "references.reference_": ("UNIPIC_REFERENCE", 6),
        },
        ours=True,
    ),
    "UniPicReference": Kind(
        {"image": "IMAGE", "mask": "MASK"},
        ("weight", "enabled", "strength", "start", "end", "x", "y", "width", "height"),
        {"reference": "UNIPIC_REFERENCE"},
        (300, 364 + PREVIEW),
        frozenset({"mask"}),
        ours=True,
    ),
    "UniPicPlanLayout": Kind(
        {},
        ("prompt", "planner"),
        {"boxes": "STRING", "sheet": "IMAGE"},
        (340, 260 + PREVIEW),
        growing={"images.image_": ("IMAGE", 6)},
        ours=True,
    ),
    "UniPicCrop": Kind(
        {"image": "IMAGE", "mask": "MASK", "model": "MODEL"},
        ("context", "budget", "grow", "edge"),
        {"stitch": "UNIPIC_STITCH", "image": "IMAGE", "mask": "MASK", "width": "INT", "height": "INT"},
        (300, 276 + PREVIEW),
        frozenset({"model"}),
        ours=True,
    ),
    "UniPicStitch": Kind(
        {"stitch": "UNIPIC_STITCH", "image": "IMAGE"}, (), {"image": "IMAGE"}, (300, 104 + PREVIEW), ours=True
    ),
    "FewStepSampler": Kind(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"},
        ("seed", CONTROL, "steps", "cfg", "sampler", "denoise", "condition_cache", "schedule", "shift", "cache_dtype"),
        {"latent": "LATENT"},
        (300, 476 + PREVIEW),
        ours=True,
    ),
    "UniPicCompare": Kind(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "vae": "VAE"},
        (
            *("seed", CONTROL, "steps", "cfg", "sampler", "denoise", "x_axis", "x_values", "y_axis", "y_values"),
            *("lora", "schedule", "shift", "condition_cache", "cache_dtype"),
        ),
        {"grid": "IMAGE", "images": "IMAGE"},
        (300, 890 + PREVIEW),
        ours=True,
    ),
    "UniPicSigmas": Kind(
        {"model": "MODEL", "latent": "LATENT"},
        ("steps", "denoise", "schedule", "shift"),
        {"sigmas": "SIGMAS"},
        (300, 258),
        ours=True,
    ),
    "UniPicSamplerSelect": Kind({}, ("sampler",), {"sampler": "SAMPLER"}, (300, 90), ours=True),
    "DistillLoRA": Kind({"model": "MODEL"}, ("lora", "strength"), {"model": "MODEL"}, (300, 182), ours=True),
    "KSampler": Kind(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("seed", CONTROL, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        {"LATENT": "LATENT"},
        (300, 304 + PREVIEW),
    ),
    "RandomNoise": Kind({}, ("noise_seed", CONTROL), {"NOISE": "NOISE"}, (300, 90)),
    "CFGGuider": Kind(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
        ("cfg",),
        {"GUIDER": "GUIDER"},
        (300, 120),
    ),
    "SamplerCustomAdvanced": Kind(
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        (),
        {"output": "LATENT", "denoised_output": "LATENT"},
        (300, 156 + PREVIEW),
    ),
    "LoadImage": Kind({}, ("image",), {"IMAGE": "IMAGE", "MASK": "MASK"}, (300, 330)),
    "SolidMask": Kind({}, ("value", "width", "height"), {"MASK": "MASK"}, (300, 122)),
    "MaskComposite": Kind(
        {"destination": "MASK", "source": "MASK"}, ("x", "y", "operation"), {"MASK": "MASK"}, (300, 140)
    ),
    "ImageFlip": Kind({"image": "IMAGE"}, ("flip_method",), {"IMAGE": "IMAGE"}, (300, 60)),
    "BatchImagesNode": Kind({}, (), {"IMAGE": "IMAGE"}, (300, 90), growing={"images.image": ("IMAGE", 50)}, first=0),
    "RebatchImages": Kind({"images": "IMAGE"}, ("batch_size",), {"IMAGE": "IMAGE"}, (300, 60)),
    "ImageScaleBy": Kind({"image": "IMAGE"}, ("upscale_method", "scale_by"), {"IMAGE": "IMAGE"}, (300, 90)),
    "UNETLoader": Kind({}, ("unet_name", "weight_dtype"), {"MODEL": "MODEL"}, (340, 130)),
    "CLIPLoader": Kind({}, ("clip_name", "type", "device"), {"CLIP": "CLIP"}, (340, 150)),
    "VAELoader": Kind({}, ("vae_name",), {"VAE": "VAE"}, (340, 100)),
    "VAEEncode": Kind({"pixels": "IMAGE", "vae": "VAE"}, (), {"LATENT": "LATENT"}, (300, 60)),
    "VAEDecode": Kind({"samples": "LATENT", "vae": "VAE"}, (), {"IMAGE": "IMAGE"}, (300, 60)),
    "ImageStitch": Kind(
        {"image1": "IMAGE", "image2": "IMAGE"},
        ("direction", "match_image_size", "spacing_width", "spacing_color"),
        {"IMAGE": "IMAGE"},
        (300, 170),
        frozenset({"image2"}),
    ),
    "SaveImage": Kind({"images": "IMAGE"}, ("filename_prefix",), {"images": "IMAGE"}, (360, 400)),
}
