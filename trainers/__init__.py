"""Trainers for UniPic checkpoints: one loop, one file per method."""
