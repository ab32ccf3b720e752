"""Front ends that start a run: one machine, SLURM, and what a run would need."""
