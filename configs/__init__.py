"""Hydra YAML presets: values only. The typed schema is `RunSettings` of train/config.py."""
