"""Rotary tables of a model: base, and what stretches the frequencies.

P positions, F rotary_dim / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from nova_sys.config import ModelConfig


def model_rope_tables(
    model: ModelConfig, num_positions: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (num_positions, head_dim / 2) fp32 of position * frequency, computed in fp64 and rounded once."""
    frequency_F = SCALINGS[model.rope_scaling](frequencies(head_dim, model.rope_base), model)
    position_P = torch.arange(num_positions, dtype=torch.float64)
    angle_PF = torch.outer(position_P, frequency_F)
    return angle_PF.cos().float(), angle_PF.sin().float()


def frequencies(rotary_dim: int, base: float) -> torch.Tensor:
    """base**(-2i / rotary_dim), (F,) fp64, radians per token."""
    exponent_F = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return base**-exponent_F


def _unscaled(frequency_F: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    return frequency_F


def _linear(frequency_F: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    return frequency_F / model.rope_factor


def _llama3(frequency_F: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Divided by the factor where a frequency makes fewer turns in the original context than the low bound, untouched above the
    high one; between the bounds the share that stays grows linearly with the turns."""
    turns_F = frequency_F * model.rope_original_positions / (2 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return frequency_F * (kept_F + (1 - kept_F) / model.rope_factor)


SCALINGS: dict[str, Callable[[torch.Tensor, ModelConfig], torch.Tensor]] = {
    "none": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
}
"""By `model.rope_scaling`."""
