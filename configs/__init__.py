"""Hydra YAML presets: values only. The typed schema lives in train/config.py."""
