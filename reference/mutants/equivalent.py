"""Mutants that nothing could see, each with the reason."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""By file, code before and code after."""
