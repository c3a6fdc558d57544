-- name_folded is the name in Unicode lower case, folded by the server: what lower() does depends on the locale.
CREATE TABLE author (
    id INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    name_folded TEXT NOT NULL
);
