"""The one error that says: the input is wrong, and nothing has been run yet."""


class InputError(ValueError):
    """Input that cannot be worked with; the message says what was given, what is allowed and how to fix it."""
