-- name_search is name_search_of with its case folded (`src/store/fold.rs`); searches look there. It counts as long as
-- name_search_of is the name: an older program writes name and name_folded alone.
ALTER TABLE author ADD COLUMN name_search TEXT;
ALTER TABLE author ADD COLUMN name_search_of TEXT;
-- The names that are to be folded anew; in the long run none.
CREATE INDEX author_unfolded ON author (id) WHERE name_search_of IS NOT name;
-- An id is an integer of 32 bits for clients, and AUTOINCREMENT goes on to 64.
CREATE TRIGGER author_id_of_new AFTER INSERT ON author
WHEN NEW.id NOT BETWEEN -2147483648 AND 2147483647
BEGIN
    SELECT RAISE(ABORT, 'no id of 32 bits is left for an author');
END;
CREATE TRIGGER author_id_of_old AFTER UPDATE ON author
WHEN NEW.id NOT BETWEEN -2147483648 AND 2147483647
BEGIN
    SELECT RAISE(ABORT, 'no id of 32 bits is left for an author');
END;
