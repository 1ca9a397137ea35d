"""Files of a run: manifest shards, stored measurements, contact sheets; and who does the work."""
