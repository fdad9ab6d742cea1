"""One run and its folder: record, checkpoints, terminal, wandb."""
