"""The one exception for bad input: says what was given, what was expected and what to do."""


class UserError(ValueError):
    """Bad input from outside (a file, a setting, a request); the command line prints it bare."""
