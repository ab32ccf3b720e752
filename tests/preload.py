"""Imported once by the fork server of `tests.distributed`, so that its children start with everything in memory.

It imports only: the CPU runtime is installed in the children, as in any other process.
"""

import atexit
import contextlib
import gc
import importlib
import os
import pkgutil
from pathlib import Path

import torch

from parallel.compat import quiet_megatron
from parallel.cpu_runtime import disable_compile

_MODULES = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "torch._dynamo",  # torch imports it when the first optimizer is made
    "hydra",
    "tokenizers",
    "wandb",
    "tests.distributed",
)
_PACKAGES = ("parallel", "model", "upcycle", "train")

if not torch.cuda.is_available():
    disable_compile()  # read when mcore is imported
quiet_megatron()
for package in _PACKAGES:
    found = pkgutil.walk_packages([str(Path(__file__).parents[1] / package)], f"{package}.")
    _MODULES += tuple(module.name for module in found if not module.name.endswith("__main__"))
for name in _MODULES:
    with contextlib.suppress(Exception):  # the child that needs it raises again, where a test sees it
        importlib.import_module(name)

# The server has nothing to clean up, and taking down torch's CUDA bindings in order prints pages of leak reports.
atexit.register(os._exit, 0)
gc.collect()
gc.freeze()  # children share these pages with the server
