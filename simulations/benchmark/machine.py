"""The machine a benchmark ran on: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import psutil
import torch

SIZE = 4096
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
PACKAGES = ("torch", "transformers", "peft", "flwr", "ray")


class Peaks(TypedDict):
    """FLOP/s of a large matrix product."""

    fp32: float
    bf16: float


def measured_peaks(threads: int) -> Peaks:
    """The best of three products of square matrices of size 4096 in each number format, on ``threads`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {"fp32": _peak(torch.float32), "bf16": _peak(torch.bfloat16)}
    finally:
        torch.set_num_threads(before)


def _peak(dtype: torch.dtype) -> float:
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up, and may still be the best
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best


def described(threads: int) -> str:
    """Processor, cores, instruction sets, memory and versions, in one line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(re.split(r"\s+", text))
    found = [name for name in INSTRUCTIONS if name in flags]
    memory = psutil.virtual_memory().total / 2**30
    cores = f"{os.cpu_count()} cores, {threads} used"
    processor = model[1] if model else platform.processor() or platform.machine()
    return f"{processor}, {cores}, {' '.join(found) or 'no known instruction set'}, {memory:.0f} GiB"


def versions() -> str:
    """This checkout, Python, and the libraries that matter, in one line."""
    libraries = [f"{name} {version(name)}" for name in PACKAGES]
    return ", ".join([f"fedlora {_checkout()}", f"Python {platform.python_version()}", *libraries])


def _checkout() -> str:
    """The version, and the commit where this is a checkout; ``dirty`` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    try:
        described = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        described = ""
    return f"{version('fedlora')} ({described})" if described else version("fedlora")
