"""Imported once by the fork server of `tests.distributed`, so that its children start with everything in memory.

It imports only: the CPU runtime is installed in the children, as in any other process.
"""

import atexit
import contextlib
import gc
import importlib
import os

import torch

from parallel.compat import quiet_megatron
from parallel.cpu_runtime import disable_compile

if not torch.cuda.is_available():
    disable_compile()  # read when mcore is imported
quiet_megatron()
for name in (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "omegaconf",
    "pytest",
    "tests.distributed",
):
    with contextlib.suppress(ImportError):  # the child that needs it says so
        importlib.import_module(name)
# The server has nothing to clean up, and taking down torch's CUDA bindings in order prints pages of leak reports.
atexit.register(os._exit, 0)
gc.collect()
gc.freeze()  # children share these pages with the server
