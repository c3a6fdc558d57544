-- Logouts, and what administrators ended, so that no restart forgets them. `logout` is JSON, as nodes tell each
-- other. `kept` is the second since 1970 in which it was kept, and `ends` that at which its time is over, by the clock
-- of the database.
CREATE TABLE revocations (
    logout TEXT NOT NULL PRIMARY KEY,
    ends BIGINT NOT NULL,
    kept BIGINT NOT NULL
);
CREATE INDEX revocations_kept ON revocations (kept);
CREATE INDEX revocations_ends ON revocations (ends);
