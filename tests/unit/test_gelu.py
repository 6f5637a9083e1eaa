"""GELU's own error function."""

import math

import numpy as np
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType

from maxwhisper.engine.program import Artifact, Program
from maxwhisper.network.gelu import ABOVE, BELOW, REACH
from maxwhisper.network.model import GELU
from reference.judge import UNIT_ROUNDOFF


def test_the_quotient_is_the_error_function_to_less_than_half_a_last_digit_of_float32() -> None:
    z = np.linspace(2**-20, REACH, 100_000)
    above, below = (np.polynomial.Polynomial(c)(z**2) for c in (ABOVE, BELOW))
    exact = np.vectorize(math.erf)(z)
    assert np.abs(z * above / below / exact - 1).max() < UNIT_ROUNDOFF[torch.float32]


def test_beyond_its_reach_the_error_function_is_one_in_float32() -> None:
    assert np.float32(math.erf(REACH)) == 1


def test_large_numbers_stay_themselves_or_vanish_and_what_is_no_number_stays_none() -> None:
    inputs = {"x": TensorType(DType.float32, ["n"], DeviceRef.CPU())}
    program = Program("gelu", "", GELU(), lambda gelu, x: [gelu(x)], inputs)
    x = torch.tensor([-1e30, -10, -6, 0, 6, 10, 1e30, math.nan])
    (y,) = Artifact("gelu", [program], "cpu").init({})["gelu"](x=x)
    assert y[:-1].tolist() == [0, 0, 0, 0, 6, 10, torch.tensor(1e30).item()]
    assert y[-1].isnan()
