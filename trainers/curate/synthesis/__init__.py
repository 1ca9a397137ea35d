"""Makers of targets: the drawn compositor, this project's pipeline, a server with an images API."""
