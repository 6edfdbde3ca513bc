"""Gemma 4 from checkpoint to answer: pull, quantize, export to ExecuTorch, run, measure."""

__version__ = "0.1.0"
