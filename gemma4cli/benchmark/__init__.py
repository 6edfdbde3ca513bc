"""Measuring a model: speed, memory, where a step's time goes, and what quantization costs. See docs/bench.md."""
