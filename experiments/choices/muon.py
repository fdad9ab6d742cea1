"""Muon: a matrix steps by its momentum made orthogonal (Jordan et al. 2024), here PyTorch's own."""

import torch
from torch import nn


def muon(
    model: nn.Module,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; Muon multiplies in bf16 whatever precision says."""
    matrices = [weight for weight in model.transformer.h.parameters() if weight.dim() == 2]
    inside = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        # its steps are scaled to the size of AdamW's (Liu et al. 2025), so that both take one learning rate
        torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0, fused=True),
    ]
