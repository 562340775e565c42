"""Schedules for problems: orders, interleaving, memory choice, bounds, baselines."""
