"""The number format of the frozen backbone: fp32, or bf16 where the machine multiplies it natively.

In bf16 the frozen weights and what flows between the blocks have 8 bits of mantissa. What is trained (adapter, head),
its gradients' sums, moments and everything on the server stay fp32; normalisations and softmax compute in fp32 inside.
"""

from __future__ import annotations

from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settled_precision(wanted: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """``wanted``, or for ``auto`` bf16 where the GPU or the CPU (AMX, AVX-512 BF16) has instructions for it."""
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_bf16() else "fp32"


def multiplies_bf16() -> bool:
    """Whether the device that trains here multiplies bf16 matrices natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
