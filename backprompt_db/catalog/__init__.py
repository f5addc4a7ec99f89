"""What the stores hold, as SQL metadata: derived from the store, never needed for a hit, rebuilt when lost."""

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import (
    CutsRecord,
    Event,
    GreedyPath,
    GroupTotals,
    ModelRecord,
    Order,
    Row,
    Selection,
    Source,
    StoredPart,
    TokenizerRecord,
    Totals,
    Victim,
)

__all__ = [
    "Catalog",
    "CutsRecord",
    "Event",
    "GreedyPath",
    "GroupTotals",
    "ModelRecord",
    "Order",
    "Row",
    "Selection",
    "Source",
    "StoredPart",
    "TokenizerRecord",
    "Totals",
    "Victim",
]
