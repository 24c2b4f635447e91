"""Pretrained mixture-of-experts checkpoints: the experts backend that runs their blocks on `moe_kit_kernels`.

Importing this package loads no kernel; `experts_backend.register()` names the backend in transformers' registry.
"""
