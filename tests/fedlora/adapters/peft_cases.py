"""PEFT methods that run on the tiny BERT, with their settings and whether the mathematics says that they are affine."""

from __future__ import annotations

from typing import NamedTuple


class PeftCase(NamedTuple):
    settings: tuple[str, ...]
    affine: bool


def _case(affine: bool, target: str, *fields: str) -> PeftCase:
    modules = "" if any(f.startswith("target_modules=") for f in fields) else "[query,intermediate.dense]"
    targets = (f"adapter.target_modules={modules}",) if modules else ()
    named = tuple(f"adapter.config.{field}" for field in fields)
    return PeftCase(("adapter=peft", f"adapter.config._target_=peft.{target}", *targets, *named), affine)


PEFT_CASES: dict[str, PeftCase] = {
    "Miss": _case(True, "MissConfig", "r=4"),
    "Miss bat": _case(True, "MissConfig", "r=4", "init_weights=bat"),
    "Miss mini": _case(True, "MissConfig", "r=4", "mini_r=4", "init_weights=mini"),
    "SHiRA": _case(True, "ShiraConfig", "r=4"),
    "C3A": _case(True, "C3AConfig", "block_size=8"),
    "FourierFT": _case(True, "FourierFTConfig", "n_frequency=50"),
    "WaveFT": _case(True, "WaveFTConfig", "n_frequency=50"),
    "IA3": _case(True, "IA3Config", "feedforward_modules=[]"),
    "BEFT": _case(True, "BeftConfig"),
    "TinyLoRA": _case(True, "TinyLoraConfig"),
    "SuperTuning": _case(True, "SupertuningConfig"),
    "FRoD": _case(True, "FrodConfig"),
    "PSOFT free R": _case(True, "PsoftConfig", "r=4", "psoft_orth=false", "psoft_mag_a=false", "psoft_mag_b=false"),
    "LoRA mica": _case(True, "LoraConfig", "r=4", "init_lora_weights=mica"),
    "LayerNorm": _case(True, "LNTuningConfig", "target_modules=[LayerNorm]"),
    "LoRA": _case(False, "LoraConfig", "r=4"),
    "DoRA": _case(False, "LoraConfig", "r=4", "use_dora=true"),
    "VeRA": _case(False, "VeraConfig", "r=8"),
    "PVeRA": _case(False, "PveraConfig", "r=8"),
    "RandLoRA": _case(False, "RandLoraConfig", "r=4"),
    "LoHa": _case(False, "LoHaConfig", "r=4"),
    "LoKr": _case(False, "LoKrConfig", "r=4"),
    "OFT": _case(False, "OFTConfig", "oft_block_size=8"),
    "BOFT": _case(False, "BOFTConfig", "boft_block_size=8"),
    "HRA": _case(False, "HRAConfig", "r=4"),
    "RoAd": _case(False, "RoadConfig", "group_size=8"),
    "PSOFT orthogonal": _case(False, "PsoftConfig", "r=4"),
    "Uni-LoRA": _case(False, "UniLoraConfig", "r=4"),
    "VB-LoRA": _case(False, "VBLoRAConfig", "r=4", "num_vectors=16", "vector_length=8"),
    "AdaLoRA": _case(False, "AdaLoraConfig", "init_r=4", "target_r=2", "total_step=10"),
    "DeLoRA": _case(False, "DeloraConfig", "r=4"),
    "HiRA": _case(False, "HiraConfig", "r=4"),
    "GraLoRA": _case(False, "GraloraConfig", "r=4"),
    "GLoRA": _case(False, "GloraConfig", "r=4"),
    "DEFT": _case(False, "DeftConfig"),
    "PEANuT": _case(False, "PeanutConfig", "r=4"),
    "Lily": _case(False, "LilyConfig", "r=4"),
    "OSF": _case(False, "OSFConfig"),
    "AdaMSS": _case(False, "AdamssConfig", "r=8"),
}
