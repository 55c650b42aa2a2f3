"""The run directory and its only owner: paths, records, shards, recipe and manifest, readers and writers."""
