-- name_folded is the name in Unicode lower case: searches look there, since LIKE of SQLite folds ASCII alone.
CREATE TABLE author (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    name_folded TEXT NOT NULL
);
