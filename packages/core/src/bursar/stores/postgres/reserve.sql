-- How amounts are held, or refused: bursar.law's `reserve`.

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
