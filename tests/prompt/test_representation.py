"""What representations say of the numbers in them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backprompt_db.prompt.representation import Array, likeliest


@pytest.mark.parametrize("odd", [math.nan, math.inf, 3e38])
def test_logits_that_are_not_finite_or_huge_are_ranked_without_a_word(odd: float) -> None:
    logits = Array.from_numpy(np.array([odd, 1.0, -3e38, -math.inf], dtype=np.float32))
    assert [token for token, _ in likeliest(logits, 3)] == [0, 1, 2]
