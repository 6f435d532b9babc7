"""In which precision things are computed, whatever dtype they come in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
