"""fedlora: federated LoRA fine-tuning, from simulation to deployment."""

import logging
import os

# Nothing phones home. Set before flwr, ray and the hub client are imported, because they read these at import.
for _variable, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_variable, _value)

# It reports a faster kernel that could be fetched from the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """``simulate`` and ``Result``, imported when asked for: what simulates stands on this package, not below it."""
    if name in ("simulate", "Result"):
        from simulations import python

        return getattr(python, name)
    raise AttributeError(f"module 'fedlora' has no attribute '{name}'")
