"""What a run reads: corpora on disk, blends of them, which sample is read when, batches."""
