"""The UniPic 3 core: sequence, network, schedules, samplers, checkpoints. Torch, numpy, Pillow and safetensors only."""

__version__ = "0.1.0"
