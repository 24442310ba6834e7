"""Training: building the model, the step, the loop, checkpoints and shards."""
