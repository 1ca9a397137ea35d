"""Filters of pictures: measurements, and decisions by thresholds."""
