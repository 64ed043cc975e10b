"""The error for requests that cannot be met."""


class UserError(ValueError):
    """Something was asked for that cannot be done; the message, one line, says what to do."""
