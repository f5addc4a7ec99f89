"""The size of what is known of the tokens that may follow, and its sums. The triggers are those of 0002 otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_OLD_SUMS = ("num_tokens", "scores_nbytes", "logits_nbytes", "kv_nbytes", "num_hits")
_SUMS = (*_OLD_SUMS, "continuations_nbytes")
_TRIGGERS = ("representations_inserted", "representations_updated", "representations_deleted")

_NUM_KV_CHILDREN = """
    SELECT count(*) FROM parents JOIN representations AS child ON child.segment_id = parents.segment_id
    WHERE parents.parent_id = {row}.segment_id AND child.weights_id = {row}.weights_id
        AND child.tokenizer_id = {row}.tokenizer_id AND child.kv_nbytes IS NOT NULL
"""
_CHANGE_PARENTS = """
    UPDATE representations SET num_kv_children = num_kv_children {change}
    WHERE weights_id = {row}.weights_id AND tokenizer_id = {row}.tokenizer_id
        AND segment_id IN (SELECT parent_id FROM parents WHERE segment_id = {row}.segment_id)
"""
_SAME_SUMS = "weights_id = {row}.weights_id AND namespace = {row}.namespace"
_ADD = "+ (NEW.kv_nbytes IS NOT NULL) - (OLD.kv_nbytes IS NOT NULL)"


def upgrade() -> None:
    _drop_triggers()
    op.add_column("representations", sa.Column("continuations_nbytes", sa.Integer(), nullable=True))
    op.add_column("sums", sa.Column("continuations_nbytes", sa.Integer(), nullable=False, server_default=sa.text("0")))
    names = ", ".join(("weights_id", "namespace", "num_representations", *_SUMS, "saved_seconds"))
    _create_triggers(_SUMS, into=f"sums ({names})")


def downgrade() -> None:
    _drop_triggers()
    for table in ("sums", "representations"):
        op.drop_column(table, "continuations_nbytes")
    _create_triggers(_OLD_SUMS, into="sums")


def _drop_triggers() -> None:
    for trigger in _TRIGGERS:
        op.execute(f"DROP TRIGGER {trigger}")


def _create_triggers(sums: Sequence[str], *, into: str) -> None:
    zeros = ", 0" * (2 + len(sums))
    op.execute(
        "CREATE TRIGGER representations_inserted AFTER INSERT ON representations BEGIN"
        f" INSERT INTO {into} VALUES (NEW.weights_id, NEW.namespace{zeros}) ON CONFLICT DO NOTHING;"
        f" {_change_sums('NEW', '+', sums)};"
        " INSERT INTO namespaces VALUES (NEW.namespace, 0) ON CONFLICT DO NOTHING;"
        f" {_change_num_segments('NEW', '+')};"
        f" UPDATE representations SET num_kv_children = ({_NUM_KV_CHILDREN.format(row='NEW')})"
        " WHERE address = NEW.address AND EXISTS (SELECT 1 FROM parents WHERE parent_id = NEW.segment_id);"
        f" {_CHANGE_PARENTS.format(row='NEW', change='+ 1')} AND NEW.kv_nbytes IS NOT NULL; END"
    )
    op.execute(
        "CREATE TRIGGER representations_updated"
        f" AFTER UPDATE OF {', '.join(sums)}, compute_seconds ON representations BEGIN"
        f" {_change_sums('OLD', '-', sums)}; {_change_sums('NEW', '+', sums)};"
        f" {_CHANGE_PARENTS.format(row='NEW', change=_ADD)} AND (NEW.kv_nbytes IS NULL) <> (OLD.kv_nbytes IS NULL); END"
    )
    op.execute(
        "CREATE TRIGGER representations_deleted AFTER DELETE ON representations BEGIN"
        f" {_change_sums('OLD', '-', sums)};"
        f" DELETE FROM sums WHERE num_representations = 0 AND {_SAME_SUMS.format(row='OLD')};"
        f" {_change_num_segments('OLD', '-')}; DELETE FROM namespaces WHERE num_segments = 0 AND name = OLD.namespace;"
        f" {_CHANGE_PARENTS.format(row='OLD', change='- 1')} AND OLD.kv_nbytes IS NOT NULL; END"
    )


def _change_sums(row: str, sign: str, sums: Sequence[str]) -> str:
    changes = ", ".join(f"{name} = {name} {sign} coalesce({row}.{name}, 0)" for name in sums)
    return (
        f"UPDATE sums SET num_representations = num_representations {sign} 1, {changes},"
        f" saved_seconds = saved_seconds {sign} {row}.num_hits * {row}.compute_seconds"
        f" WHERE {_SAME_SUMS.format(row=row)}"
    )


def _change_num_segments(row: str, sign: str) -> str:
    return (
        f"UPDATE namespaces SET num_segments = num_segments {sign} 1 WHERE name = {row}.namespace AND NOT EXISTS"
        f" (SELECT 1 FROM representations WHERE segment_id = {row}.segment_id AND address <> {row}.address)"
    )
