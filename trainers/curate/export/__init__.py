"""Export of checked rows: this project's JSONL, WebDataset with parquet, MICo-150K's fields."""
