"""From batch metadata to a verified plan, off the training's critical path."""
