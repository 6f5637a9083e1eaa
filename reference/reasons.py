"""What went wrong, in one line."""


def one_line(error: BaseException) -> str:
    """Returns the system's own reason, with the file where one is known; of any other error its type and its text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())
