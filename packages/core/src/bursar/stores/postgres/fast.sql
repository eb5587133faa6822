-- The common ways of the law as one statement each: what was met before, fits, and reaches no mark. They answer with NULL, with
-- nothing done, where that is not so, and law.sql decides. Accounts are updated in the order of their keys.

-- What a refill account has at that time, and what it has gained of a further unit.
CREATE FUNCTION bursar_level(account accounts, now_us bigint) RETURNS numeric LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN now_us > account.at_us THEN least(account."limit", account.level
        + div((now_us - account.at_us)::numeric * account."limit" + account.remainder, account.period_us)) ELSE account.level END
$$;

CREATE FUNCTION bursar_remainder(account accounts, now_us bigint) RETURNS numeric LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN now_us <= account.at_us THEN account.remainder WHEN bursar_level(account, now_us) >= account."limit" THEN 0
        ELSE mod((now_us - account.at_us)::numeric * account."limit" + account.remainder, account.period_us) END
$$;

CREATE FUNCTION bursar_reserve_fast(c jsonb, now_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id_ text := c ->> 'id';
    held_on bigint;
    opened bigint;
    after text;
BEGIN
    WITH put AS (
        INSERT INTO accounts AS a (key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
            overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks)
        SELECT line ->> 0, '', '', '', '', (line ->> 2)::bigint, 0, (line ->> 3)::bigint, (line ->> 4)::bigint,
            (line ->> 5)::boolean, 0, (line ->> 1)::bigint, 0, 0, 0, 0, 0, 0, now_us, '', 0, line ->> 6
        FROM jsonb_array_elements(c -> 'fast') AS line
        WHERE (SELECT true FROM accounts AS met WHERE met.key = line ->> 0)  -- making one takes a lock that comes before this
        ORDER BY (line ->> 0) COLLATE "C"
        ON CONFLICT (key) DO UPDATE SET
            reserved = a.reserved + excluded.reserved,
            level = CASE a.kind WHEN 'refill' THEN bursar_level(a, excluded.at_us) - excluded.reserved ELSE a.level END,
            remainder = CASE a.kind WHEN 'refill' THEN bursar_remainder(a, excluded.at_us) ELSE a.remainder END,
            at_us = CASE a.kind WHEN 'refill' THEN greatest(a.at_us, excluded.at_us) ELSE a.at_us END
        WHERE a."limit" = excluded."limit" AND a.enforce = excluded.enforce AND a.period_us = excluded.period_us
            AND a.marks = excluded.marks AND a.end_us IS NOT DISTINCT FROM excluded.end_us
            AND (a.end_us IS NULL OR excluded.at_us >= a.start_us AND excluded.at_us < a.end_us)
            AND CASE a.kind
                WHEN 'refill' THEN bursar_level(a, excluded.at_us) >= excluded.reserved
                WHEN 'rolling' THEN a."limit" - a.spent - a.reserved >= excluded.reserved AND (a.buckets = ''
                    OR (a.buckets::json -> 0 ->> 0)::bigint >= (excluded.at_us - a.period_us) / (a.period_us / 60))
                ELSE a."limit" - a.spent - a.reserved >= excluded.reserved END
            AND (a.marks = '' OR bursar_in_force(a) IS NULL)
        RETURNING '[' || to_json(key) || ',' || spent || ',' || reserved || ',' || overrun || ',' || refused || ','
            || refused_minute || ',' || refused_in_minute || ',' || level || ',' || remainder || ',' || at_us || ',"'
            || buckets || '",' || crossed || ']' AS account
    ), put_id AS (
        INSERT INTO reservations(id, held, reserved_us, expires_us, on_expiry, digest, draft)
        SELECT id_, c ->> 'held', now_us, now_us + (c ->> 'ttl_us')::bigint, c ->> 'on_expiry', c ->> 'digest', c ->> 'draft'
        WHERE NOT EXISTS (SELECT FROM records WHERE id = id_)
            AND (c ->> 'version')::bigint >= coalesce((SELECT max(version) FROM definitions), 0)
        RETURNING 1
    )
    SELECT count(*), string_agg(account, ','), (SELECT count(*) FROM put_id)
    INTO held_on, after, opened FROM put;
    IF c ->> 'behind' <> '' OR held_on < jsonb_array_length(c -> 'fast') OR opened = 0 THEN
        RAISE EXCEPTION USING ERRCODE = 'BU003';
    END IF;
    RETURN '{"t":"granted fast","now_us":' || now_us || ',"accounts":[' || coalesce(after, '') || ']}';
EXCEPTION WHEN unique_violation OR SQLSTATE 'BU003' THEN  -- what was done in this block is undone
    RETURN NULL;
END $$;

CREATE FUNCTION bursar_settle_fast(c jsonb, now_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id_ text := c ->> 'id';
    actuals jsonb := c -> 'actuals';
    wanted bigint;
    booked bigint;
    answer text;
    after text;
BEGIN
    WITH gone AS (DELETE FROM reservations WHERE id = id_ RETURNING *),
    line AS (
        SELECT one ->> 0 AS key, (one ->> 2)::bigint AS held, CASE one ->> 1 WHEN 'slots' THEN 0
            ELSE coalesce((actuals ->> (one ->> 1))::bigint, (one ->> 2)::bigint) END AS actual, number, reserved_us
        FROM gone, json_array_elements(gone.held::json) WITH ORDINALITY AS each(one, number)
    ), put AS (
        INSERT INTO accounts AS a (key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
            overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks)
        SELECT key, '', '', '', '', 0, reserved_us, NULL, 0, true, actual, held, greatest(actual - held, 0), 0, 0, 0, 0, 0,
            now_us, '', 0, ''
        FROM line ORDER BY key COLLATE "C"
        ON CONFLICT (key) DO UPDATE SET
            reserved = a.reserved - excluded.reserved,
            overrun = a.overrun + CASE a.kind WHEN 'slots' THEN 0 ELSE excluded.overrun END,
            spent = CASE a.kind
                WHEN 'slots' THEN a.spent
                WHEN 'rolling' THEN (bursar_book(a, 0, excluded.spent, excluded.start_us, excluded.at_us, 0)).spent
                ELSE a.spent + excluded.spent END,
            buckets = CASE a.kind
                WHEN 'rolling' THEN (bursar_book(a, 0, excluded.spent, excluded.start_us, excluded.at_us, 0)).buckets
                ELSE a.buckets END,
            level = CASE a.kind
                WHEN 'refill' THEN least(a."limit", bursar_level(a, excluded.at_us) + excluded.reserved - excluded.spent)
                ELSE a.level END,
            remainder = CASE
                WHEN a.kind <> 'refill' THEN a.remainder
                WHEN bursar_level(a, excluded.at_us) + excluded.reserved - excluded.spent >= a."limit" THEN 0
                ELSE bursar_remainder(a, excluded.at_us) END,
            at_us = CASE a.kind WHEN 'refill' THEN greatest(a.at_us, excluded.at_us) ELSE a.at_us END
        WHERE a.reserved >= excluded.reserved AND (a.marks = ''
            OR a.kind = 'window' AND bursar_reached(a.marks, a.spent + excluded.spent) <= a.crossed)
        RETURNING a.budget, json_build_array(a.key, a.budget, a.scope, a.unit, a.kind, a."limit", a.start_us, a.end_us,
            a.period_us, a.enforce, a.spent, a.reserved, a.overrun, a.refused, a.refused_minute, a.refused_in_minute, a.level,
            a.remainder, a.at_us, a.buckets, a.crossed, a.marks)::text AS account
    ), entry AS (
        INSERT INTO records(id, kind, outcome, estimated, reason, cost_nanos, usage, amounts, reserved_us, settled_us, digest,
            draft, facts, org, team, project, "user", customer, workflow, agent, run, tool, connection, provider, model,
            model_answered)
        SELECT id_, 'settlement', c ->> 'outcome', (c ->> 'estimated')::boolean, c ->> 'reason', (c ->> 'cost_nanos')::bigint,
            c ->> 'usage', coalesce((SELECT '{' || string_agg(to_json(key) || ':' || actual, ',' ORDER BY number) || '}'
            FROM line), '{}'), gone.reserved_us, now_us, gone.digest, gone.draft, c ->> 'facts', tag.org, tag.team, tag.project,
            tag."user", tag.customer, tag.workflow, tag.agent, tag.run, tag.tool, tag.connection, tag.provider, tag.model,
            c ->> 'answered'
        FROM gone, json_to_record(gone.draft::json -> 'tags') AS tag(org text, team text, project text, "user" text,
            customer text, workflow text, agent text, run text, tool text, connection text, provider text, model text)
        RETURNING '{"t":"settled fast","now_us":' || now_us || ',"amounts":' || amounts || ',"reserved_us":' || reserved_us
            || ',"digest":' || to_json(digest) || ',"draft":' || draft AS told
    )
    SELECT (SELECT count(*) FROM line), count(*) FILTER (WHERE budget <> ''), string_agg(account, ','), (SELECT told FROM entry)
    INTO wanted, booked, after, answer FROM put;
    IF booked < wanted OR answer IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'BU003';
    END IF;
    RETURN answer || ',"accounts":[' || coalesce(after, '') || ']}';
EXCEPTION WHEN unique_violation OR SQLSTATE 'BU003' THEN
    RETURN NULL;
END $$;

