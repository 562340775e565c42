"""Modules into chunks, batches into sub-microbatches, both into scheduling problems."""
