"""The engines of `maxwhisper compare`, and what they are given in tests."""

import pytest

from maxwhisper.compare.engines import SPECS, Spec, missing
from reference.fixtures import FIXTURES

CLIP = FIXTURES / "clips" / "english-1.wav"
LONG = FIXTURES / "clips" / "english-long.mp3"
TEXT = "Where is the young doctor that Hector found?"


def require(spec: Spec) -> None:
    if packages := missing(spec):
        pytest.skip(f"{spec.name} is not installed: pip install {' '.join(packages)}")


def named(name: str) -> Spec:
    return next(spec for spec in SPECS if spec.name == name)
