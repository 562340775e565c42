import pytest

from megatron_pipeweaver.view.units import milliseconds, percent, size


@pytest.mark.parametrize(
    ("time_ns", "shown"),
    [(0, "0.000 ms"), (1234, "0.001 ms"), (9_999_000, "9.999 ms"), (1_234_560_000, "1,234.6 ms")],
)
def test_milliseconds(time_ns, shown):
    assert milliseconds(time_ns) == shown


def test_percent():
    assert percent(0.1234) == "12.3 %"


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (150 * 1024, "150 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_size(size_bytes, shown):
    assert size(size_bytes) == shown
