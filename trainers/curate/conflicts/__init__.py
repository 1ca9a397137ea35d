"""Conflict matrix (UniPic 3, section 4.1): which sources can share a picture, and which slot each takes."""
