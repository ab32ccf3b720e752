"""The run: entry point, loop, data, checkpoints, metrics, evaluation, report."""
