"""Pictures composed from known parts: the catalogue, drawn backgrounds, scenes, their rendering, and the controls."""
