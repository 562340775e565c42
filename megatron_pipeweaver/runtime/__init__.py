"""Runs verified plans with real tensors."""
