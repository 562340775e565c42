"""Schedules, plans and traces for people to look at."""
