"""How good and how fast the schedule search is."""
