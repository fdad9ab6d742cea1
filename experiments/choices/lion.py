"""Lion: the sign of a momentum, one number a weight instead of AdamW's two (Chen et al. 2023, algorithm 2)."""

import torch


class Lion(torch.optim.Optimizer):
    """Lion; its steps are all of one size, so lr is best 3 to 10 times below AdamW's, weight_decay as far above."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Decay the weights, step by the sign of the gradient mixed into the momentum, then renew the momentum."""
        for group in self.param_groups:
            for weight in group["params"]:
                kept = self.state[weight]
                momentum = kept.setdefault("momentum", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                update = momentum.lerp(weight.grad, 1 - group["betas"][0]).sign_()
                weight.add_(update, alpha=-group["lr"])
                momentum.lerp_(weight.grad, 1 - group["betas"][1])
