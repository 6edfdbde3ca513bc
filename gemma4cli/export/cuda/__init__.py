"""The CUDA backend: the model made of our kernels, lowered for a target without needing one."""
