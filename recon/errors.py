"""The one exception that :mod:`recon` raises for input it cannot use."""


class ReconError(ValueError):
    """A file, setting or result that cannot be used; the message is one sentence naming it."""
