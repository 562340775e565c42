"""What the runtime costs: per action, per verification, and against Megatron's own schedules."""
