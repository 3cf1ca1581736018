"""A distillation method in a package of its own."""

from my_method.my_loss import MyLoss

__all__ = ["MyLoss"]
