-- name_search is name_search_of with its case folded (`src/store/fold.rs`); searches look there. It counts as long as
-- name_search_of is the name: an older program writes name and name_folded alone.
ALTER TABLE author ADD COLUMN name_search TEXT, ADD COLUMN name_search_of TEXT;
-- The names that are to be folded anew; in the long run none.
CREATE INDEX author_unfolded ON author (id) WHERE name_search_of IS DISTINCT FROM name;
