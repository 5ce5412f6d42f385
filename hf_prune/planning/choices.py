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
MOVEMENT = ("movement", "soft_movement")
UNIT_SCOPES = ("layer", "global")
BUDGETS = ("target_params", "target_flops", "target_speedup")
WORKLOAD_DEFAULTS: Mapping[str, int] = MappingProxyType({"batch_size": 1, "length": 128})
GENERATION_DEFAULTS: Mapping[str, int] = MappingProxyType({"batch_size": 1, "prompt": 128, "new_tokens": 64})
