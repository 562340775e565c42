"""Model chunks made of megatron-core's own modules."""
