-- The law: what every command does to the rows, as bursar.law.decide has it. A command is one call of bursar_apply.
--
-- Locks are taken in one order, so that nobody waits in a circle: ids (advisory), then budgets that get new accounts
-- (advisory), then accounts by key. Whoever holds an id's lock is alone with its reservation and its records. A command
-- comes as JSON; what it carries for the record (draft, usage, facts) comes as text in it and is written down as it is.

CREATE FUNCTION bursar_charge(c jsonb, careful boolean, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    entry records;
    lines accounts[] := coalesce(bursar_lines(c), '{}');
    known accounts[];
    before accounts[];
    made text[];
    rejected text;
    amounts bigint[] := '{}';
    over bigint[] := '{}';
    now_us bigint;
    moved json;
BEGIN
    SELECT * INTO entry FROM records WHERE id = c ->> 'id';
    IF FOUND AND entry.kind = 'charge' AND entry.digest = c ->> 'digest' THEN
        RETURN bursar_ended(entry, '{"accounts": [], "alerts": []}', true);
    ELSIF FOUND OR EXISTS (SELECT FROM reservations WHERE id = c ->> 'id') THEN
        RETURN bursar_rejected('conflict', c ->> 'id');
    END IF;
    known := bursar_locked(ARRAY(SELECT key FROM unnest(lines)));
    IF NOT careful AND coalesce(cardinality(known), 0) < cardinality(lines) THEN
        RETURN '{"t": "careful"}';
    END IF;
    now_us := bursar_now(given_us, seen_us);
    SELECT * INTO before, made, rejected FROM bursar_incurred(c, lines, known, now_us);
    IF rejected IS NOT NULL THEN
        RETURN rejected;
    END IF;
    FOR number IN 1 .. cardinality(lines) LOOP
        amounts := amounts || lines[number].reserved;
        over := over || greatest(0, lines[number].reserved - greatest(0, bursar_available(bursar_age(before[number], now_us))));
    END LOOP;
    moved := bursar_move(c ->> 'id', c ->> 'draft', before, array_fill(0::bigint, ARRAY[cardinality(amounts)]), amounts, over,
        now_us, now_us);
    IF made <> '{}' THEN
        PERFORM bursar_count(made);
    END IF;
    entry := bursar_entry(c, 'charge');
    entry.id := c ->> 'id';
    entry.amounts := coalesce((SELECT '{' || string_agg(to_json(key) || ':' || reserved, ',') || '}' FROM unnest(lines)), '{}');
    entry.reserved_us := now_us;
    entry.settled_us := now_us;
    entry.digest := c ->> 'digest';
    entry.draft := c ->> 'draft';
    PERFORM bursar_record(entry);
    RETURN bursar_ended(entry, moved, false);
END $$;

CREATE FUNCTION bursar_tell(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO alerts(id, kind, at_us, facts, due_us, claims, delivered_us)
    VALUES (c ->> 'id', c ->> 'kind', bursar_now(given_us, seen_us), c ->> 'facts', 0, 0, 0) ON CONFLICT DO NOTHING;
    RETURN json_build_object('t', 'told', 'again', NOT FOUND)::text;
END $$;

-- One command.
CREATE FUNCTION bursar_decide(c jsonb, careful boolean, given_us bigint, seen_us bigint) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    f jsonb := c -> 'fast';
    told text;
BEGIN
    CASE c ->> 'c'
        WHEN 'reserve' THEN
            IF f IS NOT NULL THEN
                told := bursar_reserve_fast(f ->> 0, f ->> 1, (f ->> 2)::bigint, f ->> 3, f ->> 4, (f ->> 5)::bigint,
                    (f ->> 6)::text[], (f ->> 7)::text[], (f ->> 8)::bigint[], (f ->> 9)::bigint[], (f ->> 10)::boolean[],
                    (f ->> 11)::text[], (f ->> 12)::bigint[], given_us, seen_us);
            END IF;
            RETURN coalesce(to_json(told)::text, bursar_reserve(c, careful, given_us, seen_us));
        WHEN 'settle' THEN
            IF f IS NOT NULL THEN
                told := bursar_settle_fast(f ->> 0, f ->> 1, (f ->> 2)::text[], (f ->> 3)::bigint[], (f ->> 4)::boolean[],
                    (f ->> 5)::text[], (f ->> 6)::bigint[], (f ->> 7)::bigint[], f ->> 8, (f ->> 9)::text[], f ->> 10,
                    (f ->> 11)::boolean, f ->> 12, (f ->> 13)::bigint, f ->> 14, f ->> 15, f ->> 16, given_us, seen_us);
            END IF;
            RETURN coalesce(to_json(told)::text, bursar_settle(c, given_us, seen_us));
        WHEN 'release' THEN RETURN bursar_release(c, given_us, seen_us);
        WHEN 'extend' THEN RETURN bursar_extend(c, given_us, seen_us);
        WHEN 'expire' THEN RETURN bursar_expire(c, given_us, seen_us);
        WHEN 'charge' THEN RETURN bursar_charge(c, careful, given_us, seen_us);
        WHEN 'tell' THEN RETURN bursar_tell(c, given_us, seen_us);
    END CASE;
END $$;

-- Take every lock that these commands need, in the one order.
CREATE FUNCTION bursar_lock(commands jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ids text[] := ARRAY(SELECT c ->> 'id' FROM jsonb_array_elements(commands) AS c);
    lines jsonb[] := ARRAY(
        SELECT line FROM jsonb_array_elements(commands) AS c, jsonb_array_elements((c ->> 'lines')::jsonb) AS line);
    missing jsonb[];
    keys text[];
    known accounts[];
BEGIN
    PERFORM pg_advisory_xact_lock(lock)
    FROM (SELECT DISTINCT hashtextextended(id, 0) AS lock FROM unnest(ids) AS id ORDER BY 1) AS ordered;
    -- not NOT EXISTS, which the server may answer by reading all accounts
    missing := ARRAY(
        SELECT line FROM unnest(lines) AS line WHERE (SELECT true FROM accounts WHERE key = line ->> 'key') IS NULL);
    PERFORM pg_advisory_xact_lock(lock)
    FROM (SELECT DISTINCT hashtextextended(line ->> 'budget', 1) AS lock FROM unnest(missing) AS line ORDER BY 1) AS ordered;
    SELECT array_agg(key) INTO keys FROM (
        SELECT line ->> 'key' AS key FROM unnest(lines) AS line
        UNION SELECT one ->> 0 FROM unnest(ids) AS wanted(id),
            LATERAL (SELECT held FROM reservations WHERE id = wanted.id LIMIT 1) AS open, json_array_elements(held::json) AS one
        UNION SELECT named FROM unnest(ids) AS wanted(id),
            LATERAL (SELECT amounts FROM records WHERE id = wanted.id AND kind = 'expiry' LIMIT 1) AS expired,
            json_object_keys(amounts::json) AS named
    ) AS touched;
    known := bursar_locked(keys);
    IF EXISTS (
        SELECT line ->> 'key' FROM unnest(lines) AS line EXCEPT SELECT line ->> 'key' FROM unnest(missing) AS line
        EXCEPT SELECT key FROM unnest(known)
    ) THEN  -- it went while this waited for it, and who makes it anew needs the lock of its budget: all of this once more
        RAISE EXCEPTION 'an account has gone' USING ERRCODE = '40001';
    END IF;
END $$;

-- Apply these commands one after another, all in the caller's transaction. `careful`: take every lock first, which more than one
-- command needs, and one that makes an account; else the answer "careful" says that it is needed, and nothing was done.
CREATE FUNCTION bursar_apply(commands jsonb, careful boolean, given_us bigint, seen_us bigint) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    c jsonb := commands -> 0;
    answers text[];
    now_us bigint;
BEGIN
    IF NOT careful THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(c ->> 'id', 0));
        now_us := bursar_now(given_us, seen_us);
        answers := ARRAY[bursar_decide(c, false, given_us, seen_us)];
    ELSE
        PERFORM bursar_lock(commands);
        now_us := bursar_now(given_us, seen_us);
        SELECT array_agg(bursar_decide(value, true, given_us, seen_us)) INTO answers
        FROM jsonb_array_elements(commands);
    END IF;
    RETURN '{"now_us":' || now_us || ',"answers":[' || array_to_string(answers, ',') || ']}';
END $$;
