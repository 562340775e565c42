"""SEMU, the step emulator: how long, and how much memory."""
