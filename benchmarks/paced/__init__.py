"""Wall-clock iteration times of real ranks whose stages wait their emulated times."""
