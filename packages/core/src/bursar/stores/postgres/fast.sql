-- The common ways of the law, each in one statement: what was met before, fits, and reaches no mark. They answer with NULL, with
-- nothing done, where that is not so, and law.sql decides. An upsert in the order of keys locks each account, sees it as it is
-- then, and changes it, all at once. What a statement seldom needs stands in a function, as the server prepares each of its
-- expressions for every call. Answers are texts whose parts stand between the ASCII separators of records and of units.

-- What a refill account has at that time, and what it has gained of a further unit.
CREATE FUNCTION bursar_level("limit" bigint, period_us bigint, level bigint, remainder bigint, at_us bigint, now_us bigint)
RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF now_us <= at_us THEN
        RETURN level;
    END IF;
    RETURN least("limit", level + div((now_us - at_us)::numeric * "limit" + remainder, period_us));
END $$;

CREATE FUNCTION bursar_remainder("limit" bigint, period_us bigint, level bigint, remainder bigint, at_us bigint, now_us bigint)
RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF now_us <= at_us THEN
        RETURN remainder;
    ELSIF bursar_level("limit", period_us, level, remainder, at_us, now_us) >= "limit" THEN
        RETURN 0;
    END IF;
    RETURN mod((now_us - at_us)::numeric * "limit" + remainder, period_us);
END $$;

-- Whether no bucket of a rolling window has left it.
CREATE FUNCTION bursar_is_fresh(buckets text, period_us bigint, now_us bigint) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN buckets = '' OR (buckets::json -> 0 ->> 0)::bigint >= (now_us - period_us) / (period_us / 60);
END $$;

-- What stands in an upsert where it has to be undone.
CREATE FUNCTION bursar_undo() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'BU003';
END $$;

-- Reserve under an id that nobody has used. The arrays have one element for each account, in the order of keys: sorted here,
-- they would take a tenth of the whole.
CREATE FUNCTION bursar_reserve_fast(
    id_ text, held_ text, ttl_us bigint, on_expiry_ text, draft_ text, version_ bigint, keys text[], kinds text[],
    limits bigint[], ends bigint[], enforced boolean[], marks_ text[], amounts bigint[], given_us bigint, seen_us bigint
) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    now_us bigint;
    after text;
BEGIN
    now_us := CASE WHEN pg_advisory_xact_lock(hashtextextended(id_, 0)) IS NOT NULL  -- which comes before the time
        THEN coalesce(given_us, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) END;
    IF now_us < seen_us THEN
        RETURN NULL;
    END IF;
    WITH opened AS (  -- first, so that accounts are locked for a short time
        INSERT INTO reservations(id, held, reserved_us, expires_us, on_expiry, digest, draft)
        VALUES (id_, held_, now_us, now_us + ttl_us, on_expiry_, '', draft_) RETURNING reserved_us
    ), held AS (
        INSERT INTO accounts AS a(key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
            overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks)
        SELECT line.key, '', '', '', line.kind, line."limit", 0, line.end_us, 0, line.enforce, 0, line.amount,
            0, 0, 0, 0, 0, 0, opened.reserved_us, '', 0, line.marks
        FROM opened, unnest(keys, kinds, limits, ends, enforced, marks_, amounts)
            AS line(key, kind, "limit", end_us, enforce, marks, amount)
        ON CONFLICT (key) DO UPDATE SET
            reserved = a.reserved + excluded.reserved,
            level = CASE a.kind WHEN 'refill' THEN
                bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, excluded.at_us) - excluded.reserved
                ELSE a.level END,
            remainder = CASE a.kind WHEN 'refill' THEN
                bursar_remainder(a."limit", a.period_us, a.level, a.remainder, a.at_us, excluded.at_us) ELSE a.remainder END,
            at_us = CASE a.kind WHEN 'refill' THEN greatest(a.at_us, excluded.at_us) ELSE a.at_us END
        WHERE a.kind = excluded.kind AND a."limit" = excluded."limit" AND a.end_us IS NOT DISTINCT FROM excluded.end_us
            AND a.enforce = excluded.enforce AND a.marks = excluded.marks
            AND (a.end_us IS NULL OR excluded.at_us >= a.start_us AND excluded.at_us < a.end_us)
            AND CASE a.kind
                WHEN 'window' THEN a."limit" - a.spent - a.reserved >= excluded.reserved
                WHEN 'refill' THEN
                    bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, excluded.at_us) >= excluded.reserved
                ELSE a."limit" - a.spent - a.reserved >= excluded.reserved
                    AND (a.kind <> 'rolling' OR bursar_is_fresh(a.buckets, a.period_us, excluded.at_us)) END
            AND (a.marks = '' OR bursar_in_force(a) IS NULL)
        RETURNING CASE WHEN budget <> '' THEN  -- else it was made here, without a budget
            concat_ws(E'\x1f', key, spent, reserved, overrun, refused, refused_minute, refused_in_minute, level, remainder,
                at_us, buckets, crossed) END AS told
    )
    SELECT CASE WHEN count(told) = cardinality(keys) AND coalesce(version_ >= (SELECT max(version) FROM definitions), true)
        THEN coalesce(string_agg(told, E'\x1e'), '') ELSE bursar_undo() END
    INTO after FROM held;
    RETURN concat_ws(E'\x1e', now_us, after);
EXCEPTION WHEN unique_violation OR SQLSTATE 'BU003' THEN  -- what was done is undone
    RETURN NULL;
END $$;

-- Settle an open reservation that its own process has made by the way above, so that it knows the lines and the tags.
CREATE FUNCTION bursar_settle_fast(
    id_ text, held_ text, keys text[], limits bigint[], enforced boolean[], marks_ text[], helds bigint[], actuals bigint[],
    amounts_ text, tags text[], outcome_ text, estimated_ boolean, reason_ text, cost_nanos_ bigint, usage_ text, facts_ text,
    answered text, given_us bigint, seen_us bigint
) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    now_us bigint;
    told text;
BEGIN
    now_us := CASE WHEN pg_advisory_xact_lock(hashtextextended(id_, 0)) IS NOT NULL  -- which comes before the time
        THEN coalesce(given_us, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) END;
    IF now_us < seen_us THEN
        RETURN NULL;
    END IF;
    WITH gone AS (
        DELETE FROM reservations WHERE id = id_ AND held = held_ RETURNING reserved_us, digest, draft
    ), written AS (  -- before the accounts, so that these are locked for a short time
        INSERT INTO records(id, kind, outcome, estimated, reason, cost_nanos, usage, amounts, reserved_us, settled_us, digest,
            draft, facts, org, team, project, "user", customer, workflow, agent, run, tool, connection, provider, model,
            model_answered)
        SELECT id_, 'settlement', outcome_, estimated_, reason_, cost_nanos_, usage_, amounts_, reserved_us, now_us, digest, draft,
            facts_, tags[1], tags[2], tags[3], tags[4], tags[5], tags[6], tags[7], tags[8], tags[9], tags[10], tags[11], tags[12],
            answered
        FROM gone RETURNING reserved_us
    ), booked AS (  -- a line travels as an account: what was held as `reserved`, when as `start_us`
        INSERT INTO accounts AS a(key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
            overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks)
        SELECT line.key, '', '', '', '', line."limit", written.reserved_us, 0, 0, line.enforce, line.actual, line.held,
            0, 0, 0, 0, 0, 0, now_us, '', 0, line.marks
        FROM written, unnest(keys, limits, enforced, marks_, helds, actuals) AS line(key, "limit", enforce, marks, held, actual)
        ON CONFLICT (key) DO UPDATE SET
            reserved = a.reserved - excluded.reserved,
            overrun = a.overrun + greatest(excluded.spent - excluded.reserved, 0),
            spent = CASE a.kind
                WHEN 'rolling' THEN (bursar_book(a, 0, excluded.spent, excluded.start_us, excluded.at_us, 0)).spent
                ELSE a.spent + excluded.spent END,
            buckets = CASE a.kind WHEN 'rolling' THEN
                (bursar_book(a, 0, excluded.spent, excluded.start_us, excluded.at_us, 0)).buckets ELSE a.buckets END,
            level = CASE a.kind WHEN 'refill' THEN least(a."limit", excluded.reserved - excluded.spent
                + bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, excluded.at_us)) ELSE a.level END,
            remainder = CASE WHEN a.kind <> 'refill' THEN a.remainder
                WHEN bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, excluded.at_us)
                    + excluded.reserved - excluded.spent >= a."limit" THEN 0
                ELSE bursar_remainder(a."limit", a.period_us, a.level, a.remainder, a.at_us, excluded.at_us) END,
            at_us = CASE a.kind WHEN 'refill' THEN greatest(a.at_us, excluded.at_us) ELSE a.at_us END
        WHERE a.reserved >= excluded.reserved AND a."limit" = excluded."limit" AND a.enforce = excluded.enforce
            AND a.marks = excluded.marks
            AND (a.marks = '' OR a.kind = 'window' AND bursar_reached(a.marks, a.spent + excluded.spent) <= a.crossed)
        RETURNING CASE WHEN budget <> '' THEN
            concat_ws(E'\x1f', key, spent, reserved, overrun, refused, refused_minute, refused_in_minute, level, remainder,
                at_us, buckets, crossed) END AS told
    )
    SELECT concat_ws(E'\x1e', now_us, written.reserved_us, CASE WHEN (SELECT count(told) FROM booked) = cardinality(keys)
        THEN (SELECT string_agg(told, E'\x1e') FROM booked) ELSE bursar_undo() END)
    INTO told FROM written;
    RETURN told;
EXCEPTION WHEN unique_violation OR SQLSTATE 'BU003' THEN
    RETURN NULL;
END $$;
