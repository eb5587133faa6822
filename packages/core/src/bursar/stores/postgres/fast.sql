-- The common ways of the law in a few statements: what was met before, fits, and reaches no mark. They answer with NULL, with
-- nothing done, where that is not so, and law.sql decides. Accounts are updated one by one, in the order of their keys; what a
-- statement seldom needs stands in a function, as the server prepares each of its expressions for every call.

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

CREATE FUNCTION bursar_reserve_fast(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id_ text := c ->> 'id';
    now_us bigint;
    line jsonb;
    amount bigint;
    after text := '';
    told text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(id_, 0));
    now_us := bursar_now(given_us, seen_us);
    IF c ->> 'behind' <> '' OR (c ->> 'version')::bigint < (SELECT max(version) FROM definitions) THEN
        RETURN NULL;
    ELSIF NOT (c ->> 'new')::boolean AND EXISTS (SELECT FROM records WHERE id = id_) THEN
        RETURN NULL;
    END IF;
    INSERT INTO reservations(id, held, reserved_us, expires_us, on_expiry, digest, draft)
    VALUES (id_, c ->> 'held', now_us, now_us + (c ->> 'ttl_us')::bigint, c ->> 'on_expiry', c ->> 'digest', c ->> 'draft');
    FOR line IN SELECT value FROM jsonb_array_elements(c -> 'fast') ORDER BY (value ->> 0) COLLATE "C" LOOP
        amount := line -> 1;
        IF line ->> 2 = 'window' THEN
            UPDATE accounts SET reserved = reserved + amount
            WHERE key = line ->> 0 AND kind = 'window' AND ARRAY["limit", end_us, enforce::int] = (line ->> 3)::bigint[]
                AND marks = line ->> 4 AND "limit" - spent - reserved >= amount
                AND (end_us IS NULL OR now_us >= start_us AND now_us < end_us)
                AND (marks = '' OR bursar_in_force(accounts) IS NULL)
            RETURNING array_to_string(
                ARRAY[spent, reserved, overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, crossed], ',')
            INTO told;
        ELSE
            told := bursar_hold(line ->> 0, amount, (line ->> 3)::bigint[], line ->> 4, now_us);
        END IF;
        IF told IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'BU003';
        END IF;
        after := after || ',' || (line -> 0)::text || ':[' || told || ']';
    END LOOP;
    RETURN '{"t":"granted fast","now_us":' || now_us || ',"accounts":{' || substr(after, 2) || '}}';
EXCEPTION WHEN unique_violation OR SQLSTATE 'BU003' THEN  -- what was done in this block is undone
    RETURN NULL;
END $$;

-- As above, of an account that is no plain window.
CREATE FUNCTION bursar_hold(key_ text, amount bigint, rule bigint[], marks_ text, now_us bigint) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    told text;
BEGIN
    UPDATE accounts AS a SET
        reserved = a.reserved + amount,
        level = CASE a.kind WHEN 'refill'
            THEN bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, now_us) - amount ELSE a.level END,
        remainder = CASE a.kind WHEN 'refill'
            THEN bursar_remainder(a."limit", a.period_us, a.level, a.remainder, a.at_us, now_us) ELSE a.remainder END,
        at_us = CASE a.kind WHEN 'refill' THEN greatest(a.at_us, now_us) ELSE a.at_us END
    WHERE a.key = key_ AND a.kind <> 'window' AND ARRAY[a."limit", a.end_us, a.enforce::int] = rule AND a.marks = marks_
        AND (a.end_us IS NULL OR now_us >= a.start_us AND now_us < a.end_us)
        AND CASE a.kind
            WHEN 'refill' THEN bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, now_us) >= amount
            ELSE a."limit" - a.spent - a.reserved >= amount
                AND (a.kind <> 'rolling' OR bursar_is_fresh(a.buckets, a.period_us, now_us)) END
        AND (a.marks = '' OR bursar_in_force(a) IS NULL)
    RETURNING array_to_string(ARRAY[a.spent, a.reserved, a.overrun, a.refused, a.refused_minute, a.refused_in_minute, a.level,
        a.remainder, a.at_us, a.crossed], ',') || ',' || to_json(a.buckets)
    INTO told;
    RETURN told;
END $$;

-- Book an amount on an account that is no plain window, and give back what was held.
CREATE FUNCTION bursar_pay(key_ text, held bigint, actual bigint, reserved_us bigint, now_us bigint) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    told text;
BEGIN
    UPDATE accounts AS a SET
        reserved = a.reserved - held,
        overrun = CASE WHEN actual > held AND a.kind <> 'slots' THEN a.overrun + actual - held ELSE a.overrun END,
        spent = CASE a.kind
            WHEN 'slots' THEN a.spent
            WHEN 'rolling' THEN (bursar_book(a, 0, actual, bursar_pay.reserved_us, now_us, 0)).spent
            ELSE a.spent + actual END,
        buckets = CASE a.kind
            WHEN 'rolling' THEN (bursar_book(a, 0, actual, bursar_pay.reserved_us, now_us, 0)).buckets ELSE a.buckets END,
        level = CASE a.kind WHEN 'refill' THEN least(a."limit",
            bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, now_us) + held - actual) ELSE a.level END,
        remainder = CASE WHEN a.kind <> 'refill' THEN a.remainder
            WHEN bursar_level(a."limit", a.period_us, a.level, a.remainder, a.at_us, now_us) + held - actual >= a."limit" THEN 0
            ELSE bursar_remainder(a."limit", a.period_us, a.level, a.remainder, a.at_us, now_us) END,
        at_us = CASE a.kind WHEN 'refill' THEN greatest(a.at_us, now_us) ELSE a.at_us END
    WHERE a.key = key_ AND a.kind <> 'window' AND a.marks = '' AND a.reserved >= held
    RETURNING json_build_array(a.key, a.budget, a.scope, a.unit, a.kind, a."limit", a.start_us, a.end_us, a.period_us, a.enforce,
        a.spent, a.reserved, a.overrun, a.refused, a.refused_minute, a.refused_in_minute, a.level, a.remainder, a.at_us, a.buckets,
        a.crossed, a.marks) INTO told;
    RETURN told;
END $$;

CREATE FUNCTION bursar_settle_fast(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id_ text := c ->> 'id';
    now_us bigint;
    actuals jsonb := c -> 'actuals';
    gone reservations;
    tags jsonb;
    line jsonb;
    held_ bigint;
    actual bigint;
    number bigint;
    booked text;
    amounts_ text[] := '{}';  -- in the order in which they were held
    after text[] := '{}';
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(id_, 0));
    now_us := bursar_now(given_us, seen_us);
    DELETE FROM reservations WHERE id = id_ RETURNING * INTO gone;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    FOR line, number IN
        SELECT * FROM jsonb_array_elements(gone.held::jsonb) WITH ORDINALITY AS each(value) ORDER BY (value ->> 0) COLLATE "C"
    LOOP
        actual := CASE WHEN line ->> 1 = 'slots' THEN 0 ELSE coalesce(actuals -> (line ->> 1), line -> 2)::bigint END;
        held_ := line -> 2;
        UPDATE accounts SET reserved = reserved - held_, spent = spent + actual, overrun = overrun + greatest(actual - held_, 0)
        WHERE key = line ->> 0 AND kind = 'window' AND reserved >= held_
            AND (marks = '' OR bursar_reached(marks, spent + actual) <= crossed)
        RETURNING json_build_array(key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
            overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks) INTO booked;
        IF NOT FOUND THEN
            booked := bursar_pay(line ->> 0, held_, actual, gone.reserved_us, now_us);
        END IF;
        IF booked IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'BU003';
        END IF;
        amounts_[number] := (line -> 0)::text || ':' || actual;
        after[number] := booked;
    END LOOP;
    tags := gone.draft::jsonb -> 'tags';
    INSERT INTO records(id, kind, outcome, estimated, reason, cost_nanos, usage, amounts, reserved_us, settled_us, digest,
        draft, facts, org, team, project, "user", customer, workflow, agent, run, tool, connection, provider, model,
        model_answered)
    VALUES (id_, 'settlement', c ->> 'outcome', (c -> 'estimated')::boolean, c ->> 'reason', (c -> 'cost_nanos')::bigint,
        c ->> 'usage', '{' || array_to_string(amounts_, ',') || '}', gone.reserved_us, now_us, gone.digest, gone.draft, c ->> 'facts', tags ->> 'org',
        tags ->> 'team', tags ->> 'project', tags ->> 'user', tags ->> 'customer', tags ->> 'workflow', tags ->> 'agent',
        tags ->> 'run', tags ->> 'tool', tags ->> 'connection', tags ->> 'provider', tags ->> 'model', c ->> 'answered');
    RETURN '{"t":"settled fast","now_us":' || now_us || ',"amounts":{' || array_to_string(amounts_, ',') || '},"reserved_us":'
        || gone.reserved_us || ',"digest":' || to_json(gone.digest) || ',"draft":' || gone.draft || ',"accounts":['
        || array_to_string(after, ',') || ']}';
EXCEPTION WHEN unique_violation OR SQLSTATE 'BU003' THEN
    RETURN NULL;
END $$;
