"""Stages of a run, each from the manifest of the one before to the next."""
