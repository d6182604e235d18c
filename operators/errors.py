"""The error that the operators raise."""


class OperatorError(ValueError):
    """Input that an operator cannot work with; the message names the thing and what was expected of it."""
