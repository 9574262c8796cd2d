"""Plans of small calls as if they were large ones."""

import contextlib
from unittest import mock

from tdpo_ext.fused.planning import choose
from tdpo_ext.fused.planning.costs import MachineRates
from tdpo_ext.fused.planning.sizes import Sizes

# In small calls it is reading weights that costs, and whatever reads them least often would be chosen. In large ones
# it is products.
PRODUCTS_DECIDE = MachineRates(products=1e9, weights=1e15, memory=1e15)


@contextlib.contextmanager
def plans_of_large_calls(streaming_rows=choose.STREAMING_ROWS):
    """A context in which products decide between plans, and streaming takes blocks of `streaming_rows`."""
    with (
        mock.patch.object(choose, "rates_of", return_value=PRODUCTS_DECIDE),
        mock.patch.object(choose, "STREAMING_ROWS", streaming_rows),
    ):
        choose._make_plan.cache_clear()
        yield
    choose._make_plan.cache_clear()


def llm_sizes(vocab, width=4096):
    """Of bfloat16 weights that are trained."""
    return Sizes(vocab=vocab, width=width, ref_width=width, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)
