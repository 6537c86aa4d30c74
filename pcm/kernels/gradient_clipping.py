"""Clipping gradients by value."""

from collections.abc import Sequence

from torch import nn


def clip_values(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """nn.utils.clip_grad_value_, which on a CPU would go through every gradient twice."""
    if parameters[0].device.type != "cpu":
        nn.utils.clip_grad_value_(parameters, limit)
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.clamp_(-limit, limit)
