"""Where the repository is, and its fixtures."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
NANO = FIXTURES / "nano.pt"
"""The trained checkpoint; see fixtures/README.md."""
