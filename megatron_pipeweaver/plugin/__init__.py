"""PipeWeaver inside Megatron."""
