"""Schedules into verified plans: pure lowering passes and the checks that guard them."""
