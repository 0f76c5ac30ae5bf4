"""Beside the laws: half precision is no exception. What serves a pipeline serves it in bfloat16."""

import pytest
import torch
from roster import STEPS, cases

from accel import Plan
from accel.errors import UnsupportedModel


@cases(kin=False)
def test_in_bfloat16_a_run_ends_as_stocks_does(bench, name, method):
    """Finite, of stock's shape and type, or a wider one: CogView4 begins in float32."""
    half = torch.bfloat16
    stock = bench.stock(name, steps=STEPS, dtype=half)
    try:
        run = Plan(method).attach(bench.pipe(name, half))
    except UnsupportedModel as error:
        assert "computes in torch.bfloat16" in str(error)
        pytest.skip(str(error))
    with run:
        output = bench.call(name, steps=STEPS, dtype=half)
    assert torch.promote_types(output.dtype, stock.dtype) == output.dtype
    assert output.shape == stock.shape and output.isfinite().all()
    assert run.report.nfe > 0
