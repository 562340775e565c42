"""What only a GPU can show; `scripts/gpu_check.sh` runs it."""
