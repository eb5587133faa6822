-- Accounts: the arithmetic of bursar.accounts, on rows of the table `accounts`. Each function is named as it is there.

-- Time as the store counts it: the given one, or the server's own, which never falls behind what somebody has seen of it.
CREATE FUNCTION bursar_now(given_us bigint, seen_us bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    now_us bigint := given_us;
BEGIN
    IF given_us IS NULL THEN
        now_us := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
        IF now_us < seen_us - 60000000 THEN
            RAISE EXCEPTION '%', (seen_us - now_us) / 1000000 USING ERRCODE = 'BU001';
        END IF;
    END IF;
    RETURN greatest(now_us, seen_us);
END $$;

CREATE FUNCTION bursar_reached(marks text, amount bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT count(*) FROM json_array_elements(CASE marks WHEN '' THEN '[]' ELSE marks END::json) AS mark
    WHERE amount >= (mark ->> 0)::bigint
$$;

-- The account under the rule of the line, which the policy states now.
CREATE FUNCTION bursar_under(account accounts, line accounts) RETURNS accounts LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF (account.budget, account.scope, account.unit, account.kind, account."limit", account.start_us, account.period_us,
        account.enforce, account.marks) = (line.budget, line.scope, line.unit, line.kind, line."limit", line.start_us,
        line.period_us, line.enforce, line.marks) AND account.end_us IS NOT DISTINCT FROM line.end_us
    THEN
        RETURN account;
    END IF;
    line.spent := account.spent;
    line.reserved := account.reserved;
    line.overrun := account.overrun;
    line.refused := account.refused;
    line.refused_minute := account.refused_minute;
    line.refused_in_minute := account.refused_in_minute;
    line.level := account.level;
    line.remainder := account.remainder;
    line.at_us := account.at_us;
    line.buckets := account.buckets;
    line.crossed := least(account.crossed, bursar_reached(line.marks, account.spent));
    RETURN line;
END $$;

CREATE FUNCTION bursar_still_crossed(account accounts) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF account.kind = 'rolling' THEN
        RETURN least(account.crossed, bursar_reached(account.marks, account.spent));
    END IF;
    RETURN account.crossed;
END $$;

-- The indices of the marks that hold for a call that is to be reserved now, from 0.
CREATE FUNCTION bursar_in_force(account accounts) RETURNS bigint[] LANGUAGE sql IMMUTABLE AS $$
    SELECT array_agg(number - 1 ORDER BY number)
    FROM json_array_elements(account.marks::json) WITH ORDINALITY AS found(mark, number)
    WHERE (
        mark ->> 1 IN ('downgrade', 'clamp', 'throttle', 'block')
        AND account.spent + account.reserved >= (mark ->> 0)::bigint
    ) OR (mark ->> 1 IN ('ask', 'kill') AND number <= bursar_still_crossed(account))
$$;

-- Products of times and limits pass 2^63, so a refill is worked out in numeric.
CREATE FUNCTION bursar_age(account accounts, now_us bigint) RETURNS accounts LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    oldest bigint;
    gained numeric;
    level numeric;
BEGIN
    IF account.kind = 'rolling' AND account.buckets <> '' THEN
        oldest := (now_us - account.period_us) / (account.period_us / 60);
        IF (account.buckets::json -> 0 ->> 0)::bigint < oldest THEN
            SELECT coalesce('[' || string_agg(bucket::text, ',' ORDER BY (bucket ->> 0)::bigint) || ']', ''),
                   coalesce(sum((bucket ->> 1)::bigint), 0)
            INTO account.buckets, account.spent
            FROM json_array_elements(account.buckets::json) AS bucket WHERE (bucket ->> 0)::bigint >= oldest;
        END IF;
    ELSIF account.kind = 'refill' AND now_us > account.at_us THEN
        gained := (now_us - account.at_us)::numeric * account."limit" + account.remainder;
        level := account.level + div(gained, account.period_us);
        IF level < account."limit" THEN
            account.level := level;
            account.remainder := mod(gained, account.period_us);
        ELSE
            account.level := account."limit";
            account.remainder := 0;
        END IF;
        account.at_us := now_us;
    END IF;
    RETURN account;
END $$;

CREATE FUNCTION bursar_available(account accounts) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF account.kind = 'refill' THEN
        RETURN account.level;
    END IF;
    RETURN account."limit" - account.spent - account.reserved;
END $$;

CREATE FUNCTION bursar_book(
    account accounts, held bigint, actual bigint, reserved_us bigint, now_us bigint, over bigint
) RETURNS accounts LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    width bigint;
BEGIN
    account.reserved := account.reserved - held;
    IF account.kind = 'slots' THEN
        RETURN account;
    END IF;
    account := bursar_age(account, now_us);
    account.overrun := account.overrun + over;
    IF account.kind = 'rolling' THEN
        width := account.period_us / 60;
        IF reserved_us / width >= (now_us - account.period_us) / width THEN
            SELECT '[' || string_agg('[' || number || ',' || amount || ']', ',' ORDER BY number) || ']', sum(amount)
            INTO account.buckets, account.spent
            FROM (
                SELECT number, sum(amount) AS amount FROM (
                    SELECT (bucket ->> 0)::bigint AS number, (bucket ->> 1)::bigint AS amount
                    FROM json_array_elements(CASE account.buckets WHEN '' THEN '[]' ELSE account.buckets END::json) AS bucket
                    UNION ALL SELECT reserved_us / width, actual
                ) AS both_of_them GROUP BY number
            ) AS sums;
        ELSE  -- its bucket has left the window already
            SELECT coalesce(sum((bucket ->> 1)::bigint), 0) INTO account.spent
            FROM json_array_elements(CASE account.buckets WHEN '' THEN '[]' ELSE account.buckets END::json) AS bucket;
        END IF;
        RETURN account;
    END IF;
    account.spent := account.spent + actual;
    IF account.kind = 'refill' THEN
        account.level := account.level + held - actual;
        IF account.level >= account."limit" THEN
            account.level := account."limit";
            account.remainder := 0;
        END IF;
    END IF;
    RETURN account;
END $$;

CREATE FUNCTION bursar_until(account accounts, asked bigint, now_us bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    room bigint := bursar_available(account);
    bucket json;
BEGIN
    IF asked > account."limit" THEN
        RETURN NULL;
    ELSIF account.kind = 'refill' THEN
        RETURN ceil(((asked - account.level)::numeric * account.period_us - account.remainder) / account."limit");
    ELSIF account.kind = 'rolling' THEN
        FOR bucket IN SELECT json_array_elements(CASE account.buckets WHEN '' THEN '[]' ELSE account.buckets END::json) LOOP
            room := room + (bucket ->> 1)::bigint;
            IF room >= asked THEN
                RETURN ((bucket ->> 0)::bigint + 1) * (account.period_us / 60) + account.period_us - now_us;
            END IF;
        END LOOP;
        RETURN NULL;
    END IF;
    RETURN account.end_us - now_us;
END $$;
