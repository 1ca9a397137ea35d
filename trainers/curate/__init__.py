"""Data curation, section 4.1 of the paper: filter, pair, write prompts, synthesise targets, check, export."""
