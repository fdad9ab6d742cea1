"""Choices that the field asks about; as `--config-dir pkg://gpt2exp.examples` they are in every installation."""
