"""Front ends that start a run: one machine now, SLURM later."""
