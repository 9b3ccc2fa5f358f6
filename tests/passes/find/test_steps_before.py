"""Steps between the product of queries and keys and the loop, in operators that torch does not tag as elementwise."""

import pytest
import torch
from helpers.attention import Attention, find, log_domain, order

LOW = -1e4
STEPS = {
    "where": lambda scores: torch.where(scores > LOW, scores, LOW),
    "multiply and divide": lambda scores: torch.divide(torch.multiply(scores, 3.0), 3.0),
    "subtract and negative": lambda scores: torch.negative(torch.subtract(torch.negative(scores), 1.0)),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_product_is_found_behind_them(step) -> None:
    (site,) = find(Attention(lambda scores: log_domain(step(scores), order(6, "rows")))).sites
    assert (site.loop.half_steps, site.loop.last) == (6, "rows")
    assert site.epsilon == pytest.approx([0.5, 0.5], rel=1e-6)
