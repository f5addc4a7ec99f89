"""Random texts: concatenations and parallel branches of random pieces, nested."""

from __future__ import annotations

from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.prompt.text import Text


def graphs(*, alphabet: str, max_leaves: int) -> st.SearchStrategy[Text]:
    """Return a strategy for texts whose pieces are one to six characters of `alphabet`."""
    return st.recursive(
        st.text(alphabet=alphabet, min_size=1, max_size=6).map(Text),
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(lambda texts: sum(texts[1:], start=texts[0])),
            st.lists(inner, min_size=2, max_size=3).map(lambda texts: bp.parallel(*texts)),
        ),
        max_leaves=max_leaves,
    )
