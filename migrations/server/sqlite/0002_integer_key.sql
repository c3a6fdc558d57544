-- The key becomes an integer, as clients of the Python application know it. The UUID that is made where the
-- action happened becomes `uid`: a row that is written twice is still one row.
-- The rows have an integer already, SQLite's rowid. So their bytes stay as they are, and only the text of the
-- table changes, which takes milliseconds however long the table is. `number` is the rowid's name.
ALTER TABLE user_actions RENAME COLUMN id TO uid;
-- Makes sqlite_sequence, where AUTOINCREMENT has its numbers.
CREATE TABLE numbered (id INTEGER PRIMARY KEY AUTOINCREMENT);
DROP TABLE numbered;
PRAGMA writable_schema = ON;
UPDATE sqlite_schema SET sql = replace(sql, 'uid TEXT PRIMARY KEY', 'uid TEXT NOT NULL UNIQUE')
    WHERE type = 'table' AND name = 'user_actions';
-- Columns that somebody added stay. `id` cannot be written: a node of the previous release, whose statement would
-- write its UUID there, is refused whatever the row, and keeps its rows in its spool for this release.
UPDATE sqlite_schema SET sql = substr(sql, 1, length(sql) - 1)
    || ', number INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER GENERATED ALWAYS AS (number) VIRTUAL)'
    WHERE type = 'table' AND name = 'user_actions';
PRAGMA writable_schema = RESET;
INSERT INTO sqlite_sequence (name, seq) SELECT 'user_actions', coalesce(max(number), 0) FROM user_actions;
