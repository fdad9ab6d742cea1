"""The training step: trainer, optimizer, precision, devices, several processes."""
