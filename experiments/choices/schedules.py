"""Learning rates over the steps, as shares of optimizer.lr: step counts from 0, the last is steps - 1."""


def linear(step: int, steps: int, warmup: int = 0, end: float = 0.0) -> float:
    """Up to 1 in a line over the warm-up, then down in a line to `end`."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - end) * (step - warmup) / max(1, steps - 1 - warmup)


def wsd(step: int, steps: int, warmup: int = 0, decay: float = 0.2) -> float:
    """Warm-up, stable, decay: 1 until the last `decay` of the steps, then down in a line to 0 (Hu et al. 2024)."""
    if step < warmup:
        return (step + 1) / warmup
    falling = round(decay * steps)
    return 1.0 if step < steps - falling else (steps - 1 - step) / falling
