"""A pretended CUDA device for a CPU build of PyTorch: tensors that say ``cuda:0`` and carry real values in main memory.

Unlike fake tensors they have values, so code runs to its end and its results are compared with the CPU's. Unlike a run on
the CPU, operands on two devices and ``numpy()`` of a device tensor are refused, and all that makes the host wait for the
device is recorded by line. Memory, streams, NCCL, the limits of kernels and speed are not seen.

``library.load`` comes before PyTorch is imported, so this needs a process of its own.
"""
