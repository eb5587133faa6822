-- What the law's functions share: rows that are read, locked, moved and written.

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

-- The accounts of these keys, locked in the order of keys. One by one, here and elsewhere, since a plan that was made while there
-- were few rows would read all of them when there are many.
CREATE FUNCTION bursar_locked(keys text[]) RETURNS accounts[] LANGUAGE plpgsql AS $$
DECLARE
    known accounts[];
BEGIN
    SELECT array_agg(each.account) INTO known
    FROM (SELECT key COLLATE "C" AS key FROM unnest(keys) AS key GROUP BY 1 ORDER BY 1) AS wanted,
        LATERAL (SELECT account FROM accounts AS account WHERE key = wanted.key FOR NO KEY UPDATE) AS each;
    RETURN known;
END $$;

-- The accounts of these keys, in their order.
CREATE FUNCTION bursar_accounts(keys text[]) RETURNS accounts[] LANGUAGE sql AS $$
    SELECT array_agg(each.account ORDER BY number) FROM unnest(keys) WITH ORDINALITY AS wanted(key, number),
        LATERAL (SELECT account FROM accounts AS account WHERE key = wanted.key LIMIT 1) AS each
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
