"""What the stores hold, as SQL metadata: derived from the store, never needed for a hit, rebuilt when lost."""

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import CutsRecord, ModelRecord, Row, Source, StoredPart, TokenizerRecord, Totals

__all__ = ["Catalog", "CutsRecord", "ModelRecord", "Row", "Source", "StoredPart", "TokenizerRecord", "Totals"]
