"""Arithmetic of quantization: grids, ranges and fake-quant modules. Knows tensors, not graphs."""
