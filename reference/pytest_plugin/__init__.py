"""The suite as a plugin of pytest: options, what they select, what compiles when, and what is said at the end."""

pytest_plugins = [
    f"{__name__}.{part}" for part in ("options", "models", "parameters", "selection", "compiling", "progress", "ending")
]
