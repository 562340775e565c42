"""PipeWeaver: dynamic interleaved pipeline schedules for large multimodal models on Megatron-LM.

Importing this package loads neither torch nor megatron.
"""

__version__ = "0.1.0"
