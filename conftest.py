"""Loaded before all tests: without a GPU, Triton's kernels run in its interpreter, which it chooses at its import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
