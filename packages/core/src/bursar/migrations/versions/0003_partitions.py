"""On PostgreSQL, records in partitions by month of the time with which ids begin; the table that was there takes all other ids."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# A long report holds the table: waiting for it in the queue of locks would hold up every settlement, so each try is short.
_LOCK = """
DO $$ BEGIN
    FOR tried IN 1 .. 100 LOOP
        BEGIN
            SET LOCAL lock_timeout = '1s';
            LOCK TABLE records IN ACCESS EXCLUSIVE MODE;
            SET LOCAL lock_timeout = 0;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.5);
        END;
    END LOOP;
    RAISE EXCEPTION 'somebody reads the records for too long' USING ERRCODE = '55P03';
END $$
"""
# Functions of older versions name the row's type, which is another one afterwards: they are made again from their text, so
# that their processes go on, and rows of the old type that they hold are taken for those of the new one, whose part it is.
_SWAP = """
DO $$
DECLARE
    since text := (SELECT substring(pg_get_constraintdef(oid) from '[0-9a-f]{14}') FROM pg_constraint
        WHERE conrelid = 'records'::regclass AND conname = 'records_timed_elsewhere');
    month timestamptz := date_trunc('month', now(), 'UTC');
    functions text[];
    dropped text;
    command text;
    lower_id text;
    upper_id text;
BEGIN
    IF since IS NOT NULL THEN
        month := to_timestamp(('x' || since)::bit(56)::bigint / 1000000.0);
    ELSIF EXISTS (SELECT FROM records) THEN
        month := date_trunc('month', now() + interval '7 days', 'UTC') + interval '1 month';
    END IF;
    SELECT array_agg(pg_get_functiondef(oid)), string_agg(oid::regprocedure::text, ', ') INTO functions, dropped FROM pg_proc
    WHERE pronamespace = current_schema()::regnamespace
        AND (prorettype = 'records'::regtype OR 'records'::regtype = ANY (proargtypes::oid[]));
    IF dropped IS NOT NULL THEN
        EXECUTE 'DROP FUNCTION ' || dropped;
    END IF;
    ALTER TABLE records RENAME TO records_other;
    ALTER INDEX records_pkey RENAME TO records_other_pkey;
    CREATE TABLE records (LIKE records_other INCLUDING DEFAULTS, PRIMARY KEY (id)) PARTITION BY RANGE (id);
    FOR command IN
        SELECT 'GRANT ' || privilege_type || ' ON records TO '
            || CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END
        FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = 'records_other'::regclass AND grantee <> relowner
    LOOP
        EXECUTE command;
    END LOOP;
    ALTER TABLE records ATTACH PARTITION records_other DEFAULT;
    lower_id := lpad(to_hex((extract(epoch FROM month) * 1000000)::bigint), 14, '0');
    CREATE TEMP TABLE timed_already (LIKE records_other) ON COMMIT DROP;
    WITH gone AS (DELETE FROM records_other WHERE id >= lower_id AND id < '0f' RETURNING *)
    INSERT INTO timed_already SELECT * FROM gone;
    EXECUTE 'CREATE TABLE records_timed PARTITION OF records FOR VALUES FROM (' || quote_literal(lower_id)
        || ') TO (''0f'') PARTITION BY RANGE (id)';
    CREATE TABLE records_ahead PARTITION OF records_timed DEFAULT;
    FOR number IN 1 .. 3 LOOP
        upper_id := lpad(to_hex((extract(epoch FROM month + interval '1 month') * 1000000)::bigint), 14, '0');
        EXECUTE 'CREATE TABLE records_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM')
            || ' PARTITION OF records_timed FOR VALUES FROM (' || quote_literal(lower_id)
            || ') TO (' || quote_literal(upper_id) || ')';
        month := month + interval '1 month';
        lower_id := upper_id;
    END LOOP;
    INSERT INTO records SELECT * FROM timed_already;
    ALTER TABLE records_other DROP CONSTRAINT IF EXISTS records_timed_elsewhere;
    FOREACH command IN ARRAY coalesce(functions, '{}') LOOP
        EXECUTE command;
    END LOOP;
END $$
"""


def upgrade() -> None:
    bound = op.get_bind()
    if bound.dialect.name == "postgresql":
        bound.exec_driver_sql("SET LOCAL timezone = 'UTC'")  # months are added in it
        bound.exec_driver_sql(_LOCK)
        bound.exec_driver_sql(_SWAP)
