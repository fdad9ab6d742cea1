"""Hydra configuration, importable so that it travels in the wheel."""
