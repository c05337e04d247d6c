"""Training: the one loop, its checkpoints and its log; adapters, probes and full fine-tuning all run in it."""
