"""Errors that the mathematics raises."""

__all__ = ["NonFiniteError"]


class NonFiniteError(ArithmeticError):
    """A tensor holds NaN or infinity where finite numbers are needed."""
