"""The contract between data preparation and training: the shards' format, and the few things that both sides share."""
