"""The values that settings accept, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FORMAT_VERSION = 1
SCOPES = ("row", "layer", "global")
ALLOCATIONS = ("uniform", "erk", "owl", "fisher")
CALIBRATED_ALLOCATIONS = ("owl", "fisher")
CALIBRATION_ORDERS = ("sequential", "one_pass")
REPAIRS = ("least_squares",)
OBJECTIVES = ("layer", "loss")
POLISHES = ("distill",)
POLISH_DEFAULTS: Mapping[str, float] = MappingProxyType({"epochs": 2, "learning_rate": 2e-4})
DEFAULT_SPARSITY = 0.5
UNIT_CRITERIA_OF: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "fisher": (
            "texts",
            "squared gradients of gates; before a repair, times the share that other units cannot make up for",
            "Kwon et al. 2022, arXiv:2204.09656",
        ),
        "magnitude": ("no data", "sum of squared weights", "Li et al. 2017, arXiv:1608.08710"),
        "random": ("no data", "random numbers", "a baseline"),
        "reconstruction": (
            "texts",
            "change of the outputs that least squares cannot prevent",
            "Kurtic et al. 2023, arXiv:2302.04089",
        ),
        "taylor": ("texts", "absolute gradients of gates", "Molchanov et al. 2019, arXiv:1906.10771"),
        "movement": ("a training", "how far weights moved from zero", "Lagunas et al. 2021, arXiv:2109.04838"),
    }
)
MOVEMENT = ("movement", "soft_movement")
UNIT_CRITERIA = tuple(UNIT_CRITERIA_OF)
UNIT_SCOPES = ("layer", "global")
BUDGETS = ("target_params", "target_flops", "target_speedup")
WORKLOAD_DEFAULTS: Mapping[str, int] = MappingProxyType({"batch_size": 1, "length": 128})
