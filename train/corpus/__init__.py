"""Text to token files on disk: `python -m train.corpus`. No training run imports this package."""
