"""What limits and operations need: counts, events, evictions, sums, and how many children keep a kv part alive.

Sums and numbers of children are kept by triggers, in the transaction of the change: whoever changes a representation,
in whatever way, keeps them right, and so does whoever is killed in the middle.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from backprompt_db.system.failpoints import reach

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SUMS = ("num_tokens", "scores_nbytes", "logits_nbytes", "kv_nbytes", "num_hits")
_SIGNED = ("models", "sources", "cuts")
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
    _create_tables()
    reach("migration.first")
    for table in _SIGNED:
        op.add_column(table, sa.Column("signature", sa.LargeBinary(), nullable=True))
    op.add_column("representations", sa.Column("namespace", sa.String(), nullable=False, server_default=sa.text("''")))
    op.add_column(
        "representations", sa.Column("num_kv_children", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    _fill()
    _create_triggers()


def _create_tables() -> None:
    op.create_table(
        "counts",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counts")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("address", sa.LargeBinary(), nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_table(
        "evictions",
        sa.Column("address", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_evictions")),
    )
    op.create_index(op.f("ix_evictions_at"), "evictions", ["at"])
    op.create_table(
        "namespaces",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("num_segments", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_namespaces")),
    )
    op.create_table(
        "sums",
        sa.Column("weights_id", sa.LargeBinary(), nullable=False),
        sa.Column("namespace", sa.String(), nullable=False),
        sa.Column("num_representations", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in _SUMS),
        sa.Column("saved_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("weights_id", "namespace", name=op.f("pk_sums")),
    )


def _fill() -> None:
    op.execute(
        "UPDATE representations SET"
        " namespace = (SELECT namespace FROM segments WHERE segments.id = representations.segment_id),"
        f" num_kv_children = ({_NUM_KV_CHILDREN.format(row='representations')})"
    )
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in _SUMS)
    op.execute(
        f"INSERT INTO sums SELECT weights_id, namespace, count(*), {sums}, total(num_hits * compute_seconds)"
        " FROM representations GROUP BY weights_id, namespace"
    )
    op.execute(
        "INSERT INTO namespaces SELECT namespace, count(DISTINCT segment_id) FROM representations GROUP BY namespace"
    )


def _create_triggers() -> None:
    zeros = ", 0" * (2 + len(_SUMS))
    op.execute(
        "CREATE TRIGGER representations_inserted AFTER INSERT ON representations BEGIN"
        f" INSERT INTO sums VALUES (NEW.weights_id, NEW.namespace{zeros}) ON CONFLICT DO NOTHING;"
        f" {_change_sums('NEW', '+')};"
        " INSERT INTO namespaces VALUES (NEW.namespace, 0) ON CONFLICT DO NOTHING;"
        f" {_change_num_segments('NEW', '+')};"
        f" UPDATE representations SET num_kv_children = ({_NUM_KV_CHILDREN.format(row='NEW')})"
        " WHERE address = NEW.address AND EXISTS (SELECT 1 FROM parents WHERE parent_id = NEW.segment_id);"
        f" {_CHANGE_PARENTS.format(row='NEW', change='+ 1')} AND NEW.kv_nbytes IS NOT NULL; END"
    )
    op.execute(
        "CREATE TRIGGER representations_updated"
        f" AFTER UPDATE OF {', '.join(_SUMS)}, compute_seconds ON representations BEGIN"
        f" {_change_sums('OLD', '-')}; {_change_sums('NEW', '+')};"
        f" {_CHANGE_PARENTS.format(row='NEW', change=_ADD)} AND (NEW.kv_nbytes IS NULL) <> (OLD.kv_nbytes IS NULL); END"
    )
    op.execute(
        "CREATE TRIGGER representations_deleted AFTER DELETE ON representations BEGIN"
        f" {_change_sums('OLD', '-')};"
        f" DELETE FROM sums WHERE num_representations = 0 AND {_SAME_SUMS.format(row='OLD')};"
        f" {_change_num_segments('OLD', '-')}; DELETE FROM namespaces WHERE num_segments = 0 AND name = OLD.namespace;"
        f" {_CHANGE_PARENTS.format(row='OLD', change='- 1')} AND OLD.kv_nbytes IS NOT NULL; END"
    )


def _change_sums(row: str, sign: str) -> str:
    changes = ", ".join(f"{name} = {name} {sign} coalesce({row}.{name}, 0)" for name in _SUMS)
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


def downgrade() -> None:
    for trigger in _TRIGGERS:
        op.execute(f"DROP TRIGGER {trigger}")
    for column in ("num_kv_children", "namespace"):
        op.drop_column("representations", column)
    for table in _SIGNED:
        op.drop_column(table, "signature")
    for table in ("sums", "namespaces", "evictions", "events", "counts"):
        op.drop_table(table)
