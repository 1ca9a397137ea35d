"""Drawings of an evaluation: the sheet of pictures, and the plot of the quality retained."""
