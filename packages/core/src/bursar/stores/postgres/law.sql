-- The law: what every command does to the rows, as bursar.law.decide has it. A command is one call of bursar_apply.
--
-- Locks are taken in one order, so that nobody waits in a circle: ids (advisory), then budgets that get new accounts
-- (advisory), then accounts by key. Whoever holds an id's lock is alone with its reservation and its records. A command
-- comes as JSON; what it carries for the record (draft, usage, facts) comes as text in it and is written down as it is.

-- Write these accounts, new or not.
CREATE FUNCTION bursar_put(put accounts[]) RETURNS void LANGUAGE sql AS $$
    INSERT INTO accounts(key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
        overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks)
    SELECT key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved,
        overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks
    FROM unnest(put)
    ON CONFLICT (key) DO UPDATE SET budget = excluded.budget, scope = excluded.scope, unit = excluded.unit,
        kind = excluded.kind, "limit" = excluded."limit", start_us = excluded.start_us, end_us = excluded.end_us,
        period_us = excluded.period_us, enforce = excluded.enforce, spent = excluded.spent, reserved = excluded.reserved,
        overrun = excluded.overrun, refused = excluded.refused, refused_minute = excluded.refused_minute,
        refused_in_minute = excluded.refused_in_minute, level = excluded.level, remainder = excluded.remainder,
        at_us = excluded.at_us, buckets = excluded.buckets, crossed = excluded.crossed, marks = excluded.marks
$$;

-- Count the accounts that were made, one budget's name each.
CREATE FUNCTION bursar_count(made text[]) RETURNS void LANGUAGE sql AS $$
    INSERT INTO account_counts(budget, accounts) SELECT budget, count(*) FROM unnest(made) AS budget GROUP BY budget
    ON CONFLICT (budget) DO UPDATE SET accounts = account_counts.accounts + excluded.accounts
$$;

-- The accounts of these keys, locked in the order of keys.
CREATE FUNCTION bursar_locked(keys text[]) RETURNS accounts[] LANGUAGE plpgsql AS $$
DECLARE
    known accounts[];
BEGIN
    SELECT array_agg(each.account) INTO known
    FROM (SELECT account FROM accounts AS account WHERE key = ANY (keys) ORDER BY key FOR NO KEY UPDATE) AS each;
    RETURN known;
END $$;

-- The accounts of these keys, in their order.
CREATE FUNCTION bursar_accounts(keys text[]) RETURNS accounts[] LANGUAGE sql AS $$
    SELECT array_agg(account ORDER BY number)
    FROM unnest(keys) WITH ORDINALITY AS wanted(key, number) JOIN accounts AS account USING (key)
$$;

CREATE FUNCTION bursar_rejected(why text, detail text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT json_build_object('t', 'rejected', 'why', why, 'detail', detail)::text
$$;

-- Write a record; its tags and the model that answered get columns of their own.
CREATE FUNCTION bursar_record(entry records) RETURNS void LANGUAGE sql AS $$
    INSERT INTO records(id, kind, corrects, outcome, estimated, reason, cost_nanos, usage, amounts, reserved_us, settled_us,
        digest, draft, facts, org, team, project, "user", customer, workflow, agent, run, tool, connection, provider, model,
        model_answered)
    SELECT entry.id, entry.kind, entry.corrects, entry.outcome, entry.estimated, entry.reason, entry.cost_nanos, entry.usage,
        entry.amounts, entry.reserved_us, entry.settled_us, entry.digest, entry.draft, entry.facts, tag.org, tag.team,
        tag.project, tag."user", tag.customer, tag.workflow, tag.agent, tag.run, tag.tool, tag.connection, tag.provider,
        tag.model, entry.facts::json ->> 'model_answered'
    FROM json_to_record(entry.draft::json -> 'tags') AS tag(org text, team text, project text, "user" text, customer text,
        workflow text, agent text, run text, tool text, connection text, provider text, model text)
$$;

-- Book these amounts on these accounts, and put an alert out for every mark that this reaches. The answer's accounts and alerts.
CREATE FUNCTION bursar_move(
    id text, draft text, before accounts[], held bigint[], actual bigint[], over bigint[], reserved_us bigint, now_us bigint
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    account accounts;
    after accounts[] := '{}';
    told bigint;
    reached bigint;
    new_alerts jsonb := '[]';
BEGIN
    FOR number IN 1 .. coalesce(cardinality(before), 0) LOOP
        account := bursar_book(before[number], held[number], actual[number], reserved_us, now_us, over[number]);
        IF account.marks <> '' THEN
            told := bursar_still_crossed(bursar_age(before[number], now_us));
            reached := bursar_reached(account.marks, account.spent);
            FOR index IN told .. reached - 1 LOOP
                new_alerts := new_alerts || jsonb_build_object(
                    'id', id || '^' || account.key || '^' || index, 'kind', 'threshold', 'at_us', now_us, 'facts',
                    json_build_object(
                        'account', account.key, 'budget', account.budget, 'scope', account.scope, 'unit', account.unit,
                        'limit', account."limit", 'spent', account.spent, 'mark', index,
                        'at', account.marks::json -> index::int -> 0, 'action', account.marks::json -> index::int -> 1,
                        'enforce', account.enforce, 'until_us', account.end_us, 'call', id, 'tags', draft::json -> 'tags'
                    )::text);
            END LOOP;
            account.crossed := CASE WHEN reached > told THEN reached ELSE account.crossed END;
        END IF;
        after := after || account;
    END LOOP;
    PERFORM bursar_put(after);
    IF new_alerts <> '[]' THEN
        INSERT INTO alerts(id, kind, at_us, facts, due_us, claims, delivered_us)
        SELECT alert.id, alert.kind, alert.at_us, alert.facts, 0, 0, 0
        FROM jsonb_to_recordset(new_alerts) AS alert(id text, kind text, at_us bigint, facts text)
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN json_build_object('accounts', after, 'alerts', new_alerts);
END $$;

CREATE FUNCTION bursar_ended(entry records, moved json, again boolean) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT json_build_object('t', 'ended', 'entry', to_json(entry), 'accounts', moved -> 'accounts',
        'alerts', moved -> 'alerts', 'again', again)::text
$$;

-- A rule's account as it was left, new where there is none: then `level` and time are still to be set by the caller.
CREATE FUNCTION bursar_standing(line accounts, known accounts[], now_us bigint) RETURNS accounts LANGUAGE plpgsql AS $$
DECLARE
    account accounts;
BEGIN
    FOREACH account IN ARRAY coalesce(known, '{}') LOOP
        IF account.key = line.key THEN
            RETURN bursar_under(account, line);
        END IF;
    END LOOP;
    line.reserved := 0;  -- a line carries its amount there
    line.at_us := now_us;
    line.level := CASE line.kind WHEN 'refill' THEN line."limit" ELSE 0 END;
    RETURN line;
END $$;

-- Whether the budget has room for one more account, after those that this command makes.
CREATE FUNCTION bursar_may_make(line accounts, made text[], most bigint) RETURNS boolean LANGUAGE sql AS $$
    SELECT coalesce((SELECT accounts FROM account_counts WHERE budget = line.budget), 0)
        + (SELECT count(*) FROM unnest(made) AS budget WHERE budget = line.budget) < most
$$;

CREATE FUNCTION bursar_lines(c jsonb) RETURNS accounts[] LANGUAGE sql IMMUTABLE AS $$
    SELECT array_agg(jsonb_populate_record(NULL::accounts, line) ORDER BY number)
    FROM jsonb_array_elements((c ->> 'lines')::jsonb) WITH ORDINALITY AS each(line, number)
$$;

CREATE FUNCTION bursar_refuse(
    c jsonb, accounts accounts[], lines accounts[], short bigint, mark bigint, made text[], now_us bigint
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    account accounts := accounts[short];
    at accounts;
    need bigint;
    wait_us bigint;
    free boolean;
    retry_us bigint := 0;  -- when time alone makes room on all that lack it, if ever
    some_free boolean := false;
    all_ease boolean := true;
    hopeless boolean := false;
    recorded bigint := 0;
    entry records;
BEGIN
    FOR number IN 1 .. cardinality(accounts) + 1 LOOP
        IF number <= cardinality(accounts) THEN
            at := accounts[number];
            need := lines[number].reserved;
            CONTINUE WHEN need <= bursar_available(at) OR NOT at.enforce;
        ELSE  -- a mark lets calls through again when the balance is below it
            EXIT WHEN mark IS NULL;
            at := account;
            at."limit" := (at.marks::json -> mark::int ->> 0)::bigint;
            need := 1;
        END IF;
        wait_us := bursar_until(at, need, now_us);
        free := at.kind <> 'refill' AND at.reserved > 0 AND need <= at."limit" - at.spent;
        retry_us := greatest(retry_us, wait_us);
        some_free := some_free OR free;
        all_ease := all_ease AND (free OR wait_us IS NOT NULL);
        hopeless := hopeless OR wait_us IS NULL;
    END LOOP;
    IF NOT (c ->> 'quiet')::boolean THEN
        IF account.refused_minute = now_us / 60000000 THEN
            recorded := account.refused_in_minute;
        END IF;
        account.refused := account.refused + 1;
        account.refused_minute := now_us / 60000000;
        account.refused_in_minute := recorded + 1;
        IF account.budget = ANY (made) THEN  -- those of other budgets are not made
            PERFORM bursar_count(array_agg(budget)) FROM unnest(made) AS budget WHERE budget = account.budget;
            PERFORM bursar_put(array_agg(other)) FROM unnest(accounts) AS other
            WHERE other.budget = account.budget AND other.key <> account.key HAVING count(*) > 0;
        END IF;
        PERFORM bursar_put(ARRAY[account]);
        IF recorded < 60 THEN
            entry.id := (c ->> 'id') || '!' || now_us || '.' || account.refused;
            entry.kind := 'refusal';
            entry.outcome := 'blocked';
            entry.estimated := false;
            entry.reason := account.budget;
            entry.cost_nanos := 0;
            entry.usage := '{}';
            entry.amounts := '{}';
            entry.reserved_us := now_us;
            entry.settled_us := now_us;
            entry.digest := '';
            entry.draft := c ->> 'draft';
            entry.facts := json_build_object('account', account.key, 'asked', lines[short].reserved,
                'available', bursar_available(account));
            IF c ->> 'behind' <> '' THEN
                entry.facts := entry.facts::jsonb || jsonb_build_object('behind', c ->> 'behind');
            END IF;
            IF mark IS NOT NULL THEN
                entry.facts := entry.facts::jsonb || jsonb_build_object('mark', account.marks::json -> mark::int -> 1);
            END IF;
            PERFORM bursar_record(entry);
        END IF;
    END IF;
    RETURN json_build_object(
        't', 'refused', 'line', short - 1, 'accounts', accounts, 'mark', mark,
        'retry', CASE WHEN NOT hopeless THEN retry_us END, 'free', some_free AND all_ease)::text;
END $$;

CREATE FUNCTION bursar_reserve(c jsonb, careful boolean, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    reservation reservations;
    entry records;
    newest bigint;
    line accounts;
    lines accounts[] := coalesce(bursar_lines(c), '{}');
    known accounts[];
    account accounts;
    before accounts[] := '{}';
    after accounts[] := '{}';
    amount bigint;
    made text[] := '{}';
    shadowed text[] := '{}';
    short bigint;
    now_us bigint;
    held bigint[];
    marks json;
    stop bigint;
    steps jsonb := '{}';
    draft text := c ->> 'draft';
BEGIN
    SELECT * INTO reservation FROM reservations WHERE id = c ->> 'id';
    IF FOUND THEN
        IF reservation.digest <> c ->> 'digest' THEN
            RETURN bursar_rejected('conflict', c ->> 'id');
        END IF;
        RETURN json_build_object('t', 'granted again', 'reservation', to_json(reservation), 'accounts', bursar_accounts(
            ARRAY(SELECT one ->> 0 FROM json_array_elements(reservation.held::json) AS one)))::text;
    END IF;
    SELECT * INTO entry FROM records WHERE id = c ->> 'id';
    IF FOUND THEN
        IF entry.kind = 'charge' OR entry.digest <> c ->> 'digest' THEN
            RETURN bursar_rejected('conflict', c ->> 'id');
        END IF;
        RETURN json_build_object('t', 'granted again', 'entry', to_json(entry), 'accounts', bursar_accounts(
            ARRAY(SELECT key FROM json_each(entry.amounts::json))))::text;
    END IF;
    SELECT max(version) INTO newest FROM definitions;
    IF (c ->> 'version')::bigint < newest THEN
        RETURN bursar_rejected('stale', newest::text);
    END IF;
    known := bursar_locked(ARRAY(SELECT key FROM unnest(lines)));
    IF NOT careful AND coalesce(cardinality(known), 0) < cardinality(lines) THEN
        RETURN '{"t": "careful"}';
    END IF;
    now_us := bursar_now(given_us, seen_us);
    FOREACH line IN ARRAY lines LOOP
        amount := line.reserved;
        IF now_us < line.start_us AND line.end_us IS NOT NULL OR now_us >= line.end_us THEN
            RETURN bursar_rejected('moved', line.budget);
        END IF;
        account := bursar_standing(line, known, now_us);
        IF NOT line.key = ANY (SELECT key FROM unnest(known)) OR known IS NULL THEN
            IF NOT bursar_may_make(line, made, (c ->> 'max')::bigint) THEN
                RETURN bursar_rejected('accounts', line.budget);
            END IF;
            made := made || line.budget;
        END IF;
        account := bursar_age(account, now_us);
        before := before || account;
        account.reserved := account.reserved + amount;
        IF account.kind = 'refill' THEN
            account.level := account.level - amount;
        END IF;
        after := after || account;
        IF bursar_available(account) < 0 OR account.key = c ->> 'behind' THEN
            IF NOT account.enforce THEN
                shadowed := shadowed || account.key;
            ELSIF short IS NULL THEN
                short := cardinality(before);
            END IF;
        END IF;
    END LOOP;
    FOR number IN 1 .. cardinality(before) LOOP
        account := before[number];
        CONTINUE WHEN account.marks = '';
        held := bursar_in_force(account);
        CONTINUE WHEN held IS NULL;
        IF NOT account.enforce THEN
            IF NOT account.key = ANY (shadowed) THEN
                shadowed := shadowed || account.key;
            END IF;
            CONTINUE;
        END IF;
        marks := account.marks;
        SELECT min(index) INTO stop FROM unnest(held) AS index WHERE marks -> index::int ->> 1 IN ('ask', 'block', 'kill');
        IF stop IS NOT NULL THEN
            RETURN bursar_refuse(c, before, lines, number, stop, made, now_us);
        END IF;
        IF held[cardinality(held)] >= coalesce((c -> 'complied' ->> account.key)::bigint, 0) THEN
            steps := steps || jsonb_build_object(account.key, held[cardinality(held)] + 1);
        END IF;
    END LOOP;
    IF steps <> '{}' THEN
        RETURN json_build_object('t', 'stepped', 'marks', steps)::text;
    ELSIF short IS NOT NULL THEN
        RETURN bursar_refuse(c, before, lines, short, NULL, made, now_us);
    END IF;
    IF shadowed <> '{}' THEN
        draft := left(draft, -1) || ',"shadowed":' || to_json(shadowed) || '}';
    END IF;
    PERFORM bursar_put(after);
    IF made <> '{}' THEN
        PERFORM bursar_count(made);
    END IF;
    INSERT INTO reservations(id, held, reserved_us, expires_us, on_expiry, digest, draft)
    VALUES (c ->> 'id', c ->> 'held', now_us, now_us + (c ->> 'ttl_us')::bigint, c ->> 'on_expiry', c ->> 'digest', draft);
    RETURN json_build_object('t', 'granted', 'now_us', now_us, 'accounts', after, 'shadowed', shadowed)::text;
END $$;

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
    DELETE FROM reservations WHERE id = reservation.id;
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
    known := bursar_accounts(keys);
    IF coalesce(cardinality(known), 0) < cardinality(keys) THEN
        RAISE EXCEPTION 'I2 broken at %', expired.id USING ERRCODE = 'BU002';
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

CREATE FUNCTION bursar_charge(c jsonb, careful boolean, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stale boolean := (c ->> 'version')::bigint < coalesce((SELECT max(version) FROM definitions), 0);
    stored accounts;
    entry records;
    line accounts;
    lines accounts[] := coalesce(bursar_lines(c), '{}');
    known accounts[];
    account accounts;
    before accounts[] := '{}';
    amounts bigint[] := '{}';
    over bigint[] := '{}';
    made text[] := '{}';
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
    FOREACH line IN ARRAY lines LOOP
        IF now_us < line.start_us AND line.end_us IS NOT NULL THEN
            RETURN bursar_rejected('moved', line.budget);
        END IF;
        -- what was incurred in a window belongs to it, however late it is told
        account := bursar_standing(line, known, least(now_us, line.end_us - 1));
        IF NOT line.key = ANY (SELECT key FROM unnest(known)) OR known IS NULL THEN
            IF NOT bursar_may_make(line, made, (c ->> 'max')::bigint) THEN
                RETURN bursar_rejected('accounts', line.budget);
            END IF;
            made := made || line.budget;
        ELSIF stale THEN  -- a cost is booked by whatever policy, but an older one changes no limit
            SELECT one.* INTO stored FROM unnest(known) AS one WHERE one.key = line.key;
            account := stored;
        END IF;
        before := before || account;
        amounts := amounts || line.reserved;
        over := over || greatest(0, line.reserved - greatest(0, bursar_available(bursar_age(account, now_us))));
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
CREATE FUNCTION bursar_decide(c jsonb, careful boolean, now_us bigint, given_us bigint, seen_us bigint) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    CASE c ->> 'c'
        WHEN 'reserve' THEN
            RETURN coalesce(bursar_reserve_fast(c, now_us), bursar_reserve(c, careful, given_us, seen_us));
        WHEN 'settle' THEN
            RETURN coalesce(bursar_settle_fast(c, now_us), bursar_settle(c, given_us, seen_us));
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
    keys text[];
BEGIN
    PERFORM pg_advisory_xact_lock(lock)
    FROM (SELECT DISTINCT hashtextextended(id, 0) AS lock FROM unnest(ids) AS id ORDER BY 1) AS ordered;
    PERFORM pg_advisory_xact_lock(lock)
    FROM (
        SELECT DISTINCT hashtextextended(line ->> 'budget', 1) AS lock
        FROM jsonb_array_elements(commands) AS c, jsonb_array_elements((c ->> 'lines')::jsonb) AS line
        WHERE NOT EXISTS (SELECT FROM accounts WHERE key = line ->> 'key') ORDER BY 1
    ) AS ordered;
    SELECT array_agg(key) INTO keys FROM (
        SELECT line ->> 'key' AS key FROM jsonb_array_elements(commands) AS c, jsonb_array_elements((c ->> 'lines')::jsonb) AS line
        UNION SELECT one ->> 0 FROM reservations, json_array_elements(held::json) AS one WHERE id = ANY (ids)
        UNION SELECT named FROM records, json_object_keys(amounts::json) AS named WHERE id = ANY (ids) AND kind = 'expiry'
    ) AS touched;
    PERFORM bursar_locked(keys);
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
        answers := ARRAY[bursar_decide(c, false, now_us, given_us, seen_us)];
    ELSE
        PERFORM bursar_lock(commands);
        now_us := bursar_now(given_us, seen_us);
        SELECT array_agg(bursar_decide(value, true, now_us, given_us, seen_us)) INTO answers
        FROM jsonb_array_elements(commands);
    END IF;
    RETURN '{"now_us":' || now_us || ',"answers":[' || array_to_string(answers, ',') || ']}';
END $$;
