"""Training data: sources, checks, encoding, cache shards and batches."""
