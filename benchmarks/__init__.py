"""Measurements: one folder per claim."""
