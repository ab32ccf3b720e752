"""A GPU made of ordinary memory, for machines without one: tensors on `cuda:0` whose operations run on the CPU.

Why: the code for GPUs differs from the CPU's where devices, memory and waiting are concerned, and no test without a GPU
saw it run. Here whole jobs run on tensors that say they live on a GPU, with mcore as it is, and without the CPU runtime.

What it finds: operands on different devices; data taken to the host without asking; memory, byte by byte, as torch would
count it on a GPU (`torch.cuda.memory_allocated`); running out of it; every place where the host waits for the device.
What it cannot find: wrong kernels, order between streams, NCCL (gloo carries the bytes), Transformer Engine, speed.

How to use: `run_on_gpus` in `tests/simulated_gpu/launch.py` makes a whole run; `environment(gpus)` gives any other program
such GPUs. It needs g++; `device.cpp` is compiled once and kept.
"""
