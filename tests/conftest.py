"""Settings that must stand before torch is imported anywhere."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# megatron-core decorates functions with torch.compile while it is imported; compiling them on a
# CPU takes minutes for nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for processes that tests start
