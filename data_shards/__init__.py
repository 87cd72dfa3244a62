"""Shards in object storage: packed, indexed, ordered and read. Knows nothing of torch."""
