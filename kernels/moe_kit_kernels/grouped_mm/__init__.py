"""Grouped GEMM over experts."""
