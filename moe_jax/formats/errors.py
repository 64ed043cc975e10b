"""The error of all formats."""


class FormatError(ValueError):
    """What another system's layer holds cannot be read, or what is asked of it cannot be said."""
