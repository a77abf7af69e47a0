"""The one exception for bad input: its message says what was given, what was expected, what to do."""


class UserError(ValueError):
    """Bad input from outside (a file, a setting, a request); the command line prints it bare."""
