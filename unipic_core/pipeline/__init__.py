"""The whole pipeline: adds transformers (the condition encoder) to the core."""

from .pipeline import UniPicOutput, UniPicPipeline
from .text_encoder import TextEncoder
from .vae import VAE

__all__ = ["VAE", "TextEncoder", "UniPicOutput", "UniPicPipeline"]
