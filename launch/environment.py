"""What every rank's environment holds unless the user says otherwise."""

# Huge pages: without them the kernel spends more time on handing out large tensors than a switch on filling them.
DEFAULTS = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "THP_MEM_ALLOC_ENABLE": "1"}
