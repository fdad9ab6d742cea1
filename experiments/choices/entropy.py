"""How sure a model is of its predictions."""

from torch import Tensor, nn


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean entropy of the predicted distributions of a batch, in nats; ln V for a model that knows nothing."""
    log_shares = model(batch[0]).float().log_softmax(-1)
    return -(log_shares.exp() * log_shares).sum(-1).mean()
