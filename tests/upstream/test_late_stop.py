"""`upstream/late_stop.py`: Transformers' loop finds its stop check by a global name."""

import pytest
from touchpoints import CHANGED

from kimi_linear.upstream.late_stop import late_sample

pytestmark = pytest.mark.core


def test_the_loop_asks_late_by_a_class_that_can_be_replaced():
    assert late_sample() is not None, (
        f"GenerationMixin._sample does not find DeferredStopCheck by its name: {CHANGED}"
    )
