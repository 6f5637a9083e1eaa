"""Mutants that nothing could see, each with the reason."""

from collections.abc import Mapping
from types import MappingProxyType

EQUIVALENT: Mapping[tuple[str, str, str], str] = MappingProxyType({})
"""By file, code before and code after."""
