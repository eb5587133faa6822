-- How reservations end: bursar.law's `settle`, `release`, `extend` and `expire`.

-- Replace an open reservation by its record, and move every account of it. `entry` tells what the command says.
CREATE FUNCTION bursar_end(reservation reservations, entry records, actuals bigint[], given_us bigint, seen_us bigint)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    keys text[];
    held bigint[];
    known accounts[];
    now_us bigint;
    moved json;
BEGIN
    SELECT coalesce(array_agg(one ->> 0), '{}'), coalesce(array_agg((one ->> 2)::bigint), '{}') INTO keys, held
    FROM json_array_elements(reservation.held::json) AS one;
    PERFORM bursar_locked(keys);
    -- it is read before them, and an erasure may have renamed them since: another account may have that key now
    DELETE FROM reservations AS one WHERE one.id = reservation.id AND one.held = reservation.held
    RETURNING one.* INTO reservation;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'a reservation was changed' USING ERRCODE = '40001';
    END IF;
    known := bursar_accounts(keys);
    now_us := bursar_now(given_us, seen_us);
    FOR number IN 1 .. cardinality(keys) LOOP
        IF known[number].key IS DISTINCT FROM keys[number] THEN
            RAISE EXCEPTION 'I2 broken: % is missing', keys[number] USING ERRCODE = 'BU002';
        ELSIF known[number].reserved < held[number] THEN
            RAISE EXCEPTION 'I2 broken: % holds less than its reservations', keys[number] USING ERRCODE = 'BU002';
        END IF;
    END LOOP;
    moved := bursar_move(reservation.id, reservation.draft, known, held, actuals,
        ARRAY(SELECT greatest(actual - amount, 0) FROM unnest(actuals, held) AS each(actual, amount)),
        reservation.reserved_us, now_us);
    entry.id := reservation.id;
    entry.amounts := coalesce(
        (SELECT '{' || string_agg(to_json(key) || ':' || actual, ',') || '}' FROM unnest(keys, actuals) AS each(key, actual)),
        '{}');
    entry.reserved_us := reservation.reserved_us;
    entry.settled_us := now_us;
    entry.digest := reservation.digest;
    entry.draft := reservation.draft;
    PERFORM bursar_record(entry);
    RETURN bursar_ended(entry, moved, false);
END $$;

-- What a command says of the record that it causes.
CREATE FUNCTION bursar_entry(c jsonb, kind text) RETURNS records LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    entry records;
BEGIN
    entry.kind := kind;
    entry.outcome := c ->> 'outcome';
    entry.estimated := coalesce((c ->> 'estimated')::boolean, false);
    entry.reason := c ->> 'reason';
    entry.cost_nanos := coalesce((c ->> 'cost_nanos')::bigint, 0);
    entry.usage := coalesce(c ->> 'usage', '{}');
    entry.facts := c ->> 'facts';
    RETURN entry;
END $$;

-- Settle or release what has expired: a further record of the differences. What the server cannot work out, the difference
-- of two usages and whether an operator has signed, the caller tells in `late`, from an expiry that does not change any more.
CREATE FUNCTION bursar_correct(c jsonb, expired records, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    kind text := CASE c ->> 'c' WHEN 'settle' THEN 'correction' ELSE 'reversal' END;
    done records;
    entry records := bursar_entry(c, kind);
    late jsonb := c -> 'late';
    public_key text;
    keys text[];
    amounts bigint[];
    known accounts[];
    now_us bigint;
    moved json;
BEGIN
    SELECT definition::json ->> 'public' INTO public_key
    FROM definitions AS newest WHERE newest.kind = 'operator' AND name = 'operator' ORDER BY version DESC LIMIT 1;
    IF late IS NULL THEN
        RETURN json_build_object('t', 'late', 'entry', to_json(expired), 'operator', public_key)::text;
    END IF;
    entry.id := expired.id || '~';
    entry.corrects := expired.id;
    entry.cost_nanos := (late ->> 'cost_nanos')::bigint;
    entry.usage := late ->> 'usage';
    SELECT * INTO done FROM records WHERE id = entry.id;
    IF FOUND THEN
        IF done.kind <> kind OR kind = 'correction'
            AND (done.cost_nanos, done.usage::jsonb) <> (entry.cost_nanos, entry.usage::jsonb)
        THEN
            RETURN bursar_rejected('ended', done.kind);
        END IF;
        RETURN bursar_ended(done, '{"accounts": [], "alerts": []}', true);
    END IF;
    IF kind = 'reversal' AND public_key IS NOT NULL AND public_key IS DISTINCT FROM late ->> 'operator' THEN
        RETURN bursar_rejected('operator', expired.id);
    END IF;
    SELECT coalesce(array_agg(key), '{}'), coalesce(array_agg(CASE
        WHEN kind = 'reversal' THEN -value::bigint
        WHEN expired.facts::json -> 'units' ->> key = 'slots' THEN 0
        ELSE coalesce((c -> 'actuals' ->> (expired.facts::json -> 'units' ->> key))::bigint,
            (expired.facts::json -> 'held' ->> key)::bigint) - value::bigint END), '{}')
    INTO keys, amounts FROM json_each_text(expired.amounts::json);
    PERFORM bursar_locked(keys);
    IF NOT EXISTS (SELECT FROM records AS one WHERE one.id = expired.id AND one.amounts = expired.amounts) THEN
        RAISE EXCEPTION 'an expiry was changed' USING ERRCODE = '40001';
    END IF;
    known := bursar_accounts(keys);
    IF coalesce(cardinality(known), 0) < cardinality(keys) THEN
        RAISE EXCEPTION 'I2 broken: an account of % is missing', expired.id USING ERRCODE = 'BU002';
    END IF;
    now_us := bursar_now(given_us, seen_us);
    moved := bursar_move(entry.id, expired.draft, known, array_fill(0::bigint, ARRAY[cardinality(keys)]), amounts,
        ARRAY(SELECT greatest(amount, 0) FROM unnest(amounts) AS amount), expired.reserved_us, now_us);
    entry.amounts := coalesce(
        (SELECT '{' || string_agg(to_json(key) || ':' || amount, ',') || '}' FROM unnest(keys, amounts) AS each(key, amount)),
        '{}');
    entry.reserved_us := expired.reserved_us;
    entry.settled_us := now_us;
    entry.digest := expired.digest;
    entry.draft := expired.draft;
    PERFORM bursar_record(entry);
    RETURN bursar_ended(entry, moved, false);
END $$;

CREATE FUNCTION bursar_settle(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    reservation reservations;
    entry records;
BEGIN
    SELECT * INTO reservation FROM reservations WHERE id = c ->> 'id';
    IF FOUND THEN
        RETURN bursar_end(reservation, bursar_entry(c, 'settlement'), ARRAY(
            SELECT CASE one ->> 1 WHEN 'slots' THEN 0
                ELSE coalesce((c -> 'actuals' ->> (one ->> 1))::bigint, (one ->> 2)::bigint) END
            FROM json_array_elements(reservation.held::json) AS one), given_us, seen_us);
    END IF;
    SELECT * INTO entry FROM records WHERE id = c ->> 'id';
    IF NOT FOUND THEN
        RETURN bursar_rejected('unknown', c ->> 'id');
    ELSIF entry.kind = 'expiry' THEN
        RETURN bursar_correct(c, entry, given_us, seen_us);
    ELSIF entry.kind <> 'settlement' THEN
        RETURN bursar_rejected('ended', entry.kind);
    ELSIF (entry.cost_nanos, entry.usage::jsonb, entry.outcome)
        <> ((c ->> 'cost_nanos')::bigint, (c ->> 'usage')::jsonb, c ->> 'outcome')
    THEN
        RETURN bursar_rejected('conflict', c ->> 'id');
    END IF;
    RETURN bursar_ended(entry, json_build_object('alerts', '[]'::json, 'accounts',
        bursar_accounts(ARRAY(SELECT key FROM json_each(entry.amounts::json)))), true);
END $$;

CREATE FUNCTION bursar_release(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    reservation reservations;
    entry records;
BEGIN
    SELECT * INTO reservation FROM reservations WHERE id = c ->> 'id';
    IF FOUND THEN
        RETURN bursar_end(reservation, bursar_entry(c, 'release'), ARRAY(
            SELECT coalesce((c -> 'actuals' ->> (one ->> 1))::bigint, 0)
            FROM json_array_elements(reservation.held::json) AS one), given_us, seen_us);
    END IF;
    SELECT * INTO entry FROM records WHERE id = c ->> 'id';
    IF NOT FOUND THEN
        RETURN bursar_rejected('unknown', c ->> 'id');
    ELSIF entry.kind = 'release' THEN
        RETURN bursar_ended(entry, '{"accounts": [], "alerts": []}', true);
    ELSIF entry.kind <> 'expiry' THEN
        RETURN bursar_rejected('ended', entry.kind);
    END IF;
    RETURN bursar_correct(c, entry, given_us, seen_us);
END $$;

-- Why there is nothing to extend or to expire under this id.
CREATE FUNCTION bursar_gone(c jsonb) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT bursar_rejected('ended', kind) FROM records WHERE id = c ->> 'id'),
        bursar_rejected('unknown', c ->> 'id'))
$$;

CREATE FUNCTION bursar_extend(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    until_us bigint := bursar_now(given_us, seen_us) + (c ->> 'ttl_us')::bigint;
BEGIN
    UPDATE reservations SET expires_us = greatest(expires_us, until_us) WHERE id = c ->> 'id'
    RETURNING expires_us INTO until_us;
    IF FOUND THEN
        RETURN json_build_object('t', 'extended', 'expires_us', until_us)::text;
    END IF;
    RETURN bursar_gone(c);
END $$;

-- The outcome is unknown: `charge` books the reserved amounts as estimated; slots are free at once (I5).
CREATE FUNCTION bursar_expire(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    reservation reservations;
    entry records;
    charge boolean;
BEGIN
    SELECT * INTO reservation FROM reservations WHERE id = c ->> 'id';
    IF NOT FOUND THEN
        RETURN bursar_gone(c);
    ELSIF bursar_now(given_us, seen_us) < reservation.expires_us THEN
        RETURN bursar_rejected('live', c ->> 'id');
    END IF;
    charge := reservation.on_expiry = 'charge';
    entry.kind := 'expiry';
    entry.outcome := 'cancelled';
    entry.estimated := true;
    entry.reason := 'expired: the outcome is unknown';
    entry.cost_nanos := CASE WHEN charge THEN coalesce((reservation.draft::json ->> 'cost_nanos')::bigint, 0) ELSE 0 END;
    entry.usage := CASE WHEN charge THEN coalesce(reservation.draft::json ->> 'usage', '{}') ELSE '{}' END;
    SELECT json_build_object('units', coalesce(json_object_agg(one ->> 0, one ->> 1), '{}'),
        'held', coalesce(json_object_agg(one ->> 0, one -> 2), '{}')) INTO entry.facts
    FROM json_array_elements(reservation.held::json) AS one;
    RETURN bursar_end(reservation, entry, ARRAY(
        SELECT CASE WHEN charge AND one ->> 1 <> 'slots' THEN (one ->> 2)::bigint ELSE 0 END
        FROM json_array_elements(reservation.held::json) AS one), given_us, seen_us);
END $$;
