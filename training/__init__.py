"""Training: router, checkpoints of runs, parameter groups, LoRA, quantised experts."""
