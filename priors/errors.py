"""The one error class of this package."""


class PriorError(ValueError):
    """A prior cannot be built, loaded or evaluated as asked; the message names what is wrong."""
