-- Costs that have been incurred: what a charge and a lease's holder book, whatever the limits say.

-- The accounts of these lines as they stood, and the budgets that get a new one; or why a line cannot be booked.
CREATE FUNCTION bursar_incurred(
    c jsonb, lines accounts[], known accounts[], now_us bigint, OUT before accounts[], OUT made text[], OUT rejected text
) LANGUAGE plpgsql AS $$
DECLARE
    stale boolean := (c ->> 'version')::bigint < coalesce((SELECT max(version) FROM definitions), 0);
    stored accounts;
    line accounts;
    account accounts;
BEGIN
    before := '{}';
    made := '{}';
    FOREACH line IN ARRAY lines LOOP
        -- what was incurred in a window belongs to it, however late it is told, or however far this clock is behind
        account := bursar_standing(line, known,
            CASE WHEN line.end_us IS NULL THEN now_us ELSE greatest(line.start_us, least(now_us, line.end_us - 1)) END);
        IF NOT line.key = ANY (SELECT key FROM unnest(known)) OR known IS NULL THEN
            IF NOT bursar_may_make(line, made, (c ->> 'max')::bigint) THEN
                rejected := bursar_rejected('accounts', line.budget);
                RETURN;
            END IF;
            made := made || line.budget;
        ELSIF stale THEN  -- a cost is booked by whatever policy, but an older one changes no limit
            SELECT one.* INTO stored FROM unnest(known) AS one WHERE one.key = line.key;
            account := stored;
        END IF;
        before := before || account;
    END LOOP;
END $$;

-- bursar.law's `draw`, of entries that are all new; they are copied into `records` in the same transaction.
CREATE FUNCTION bursar_draw(c jsonb, given_us bigint, seen_us bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    lease reservations;
    lines accounts[] := coalesce(bursar_lines(c), '{}');
    before accounts[];
    made text[];
    rejected text;
    remaining jsonb;
    paid bigint[] := '{}';
    actual bigint[] := '{}';
    over bigint[] := '{}';
    amount bigint;
    now_us bigint;
    moved json := '{"accounts": [], "alerts": []}';
BEGIN
    PERFORM bursar_lock(jsonb_build_array(c));
    now_us := bursar_now(given_us, seen_us);
    SELECT * INTO lease FROM reservations WHERE id = c ->> 'id';
    IF FOUND THEN
        SELECT coalesce(jsonb_object_agg(one ->> 0, (one ->> 2)::bigint), '{}') INTO remaining
        FROM json_array_elements(lease.held::json) AS one;
    END IF;
    IF c ->> 'last' <> '' THEN
        SELECT * INTO before, made, rejected
        FROM bursar_incurred(c, lines, bursar_locked(ARRAY(SELECT key FROM unnest(lines))), now_us);
        IF rejected IS NOT NULL THEN
            RETURN rejected;
        END IF;
        FOR number IN 1 .. cardinality(lines) LOOP
            amount := coalesce(least((remaining ->> lines[number].key)::bigint, lines[number].reserved), 0);
            IF remaining ? lines[number].key THEN
                remaining := remaining
                    || jsonb_build_object(lines[number].key, (remaining ->> lines[number].key)::bigint - amount);
            ELSE
                amount := 0;
            END IF;
            paid := paid || amount;
            actual := actual || lines[number].reserved;
            over := over || greatest(0, lines[number].reserved - amount - greatest(0, bursar_available(before[number])),
                (c -> 'overruns' ->> lines[number].key)::bigint);
        END LOOP;
        moved := bursar_move(c ->> 'last', c ->> 'draft', before, paid, actual, over, now_us, now_us);
        IF made <> '{}' THEN
            PERFORM bursar_count(made);
        END IF;
        UPDATE reservations SET
            held = (SELECT json_agg(json_build_array(one ->> 0, one ->> 1, remaining -> (one ->> 0)) ORDER BY number)::text
                FROM json_array_elements(held::json) WITH ORDINALITY AS each(one, number)),
            draft = (draft::jsonb || jsonb_build_object('cost_nanos', (
                SELECT coalesce(max((remaining ->> (one ->> 0))::bigint), 0)
                FROM json_array_elements(held::json) AS one WHERE one ->> 1 = 'USD')))::text
        WHERE id = lease.id;
    ELSE
        moved := json_build_object('accounts', bursar_accounts(ARRAY(
            SELECT line.key FROM unnest(lines) WITH ORDINALITY AS line ORDER BY line.ordinality)), 'alerts', '[]'::json);
    END IF;
    RETURN json_build_object('t', 'drawn', 'left', remaining, 'accounts', moved -> 'accounts', 'alerts', moved -> 'alerts')::text;
END $$;
