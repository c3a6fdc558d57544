-- The audit trail. The id is made where the action happened, so that a row that is written twice is one row.
-- Times are RFC 3339 texts in UTC with six decimals, which sort as times.
CREATE TABLE user_actions (
    id TEXT PRIMARY KEY,
    timestamp TEXT NOT NULL,
    user_id TEXT,
    username TEXT,
    user_roles TEXT NOT NULL,
    action_type TEXT NOT NULL,
    resource TEXT NOT NULL,
    outcome TEXT NOT NULL,
    ip_address TEXT,
    user_agent TEXT,
    request_id TEXT,
    request_data TEXT,
    response_status INTEGER,
    error_message TEXT,
    duration_ms REAL
);
-- One for each filter, in the order of the answer: newest first. The id, which decides between rows of one
-- microsecond alone, is left out: indexes are most of what a row costs.
CREATE INDEX user_actions_timestamp ON user_actions (timestamp);
CREATE INDEX user_actions_user_id ON user_actions (user_id, timestamp);
CREATE INDEX user_actions_username ON user_actions (username, timestamp);
CREATE INDEX user_actions_action_type ON user_actions (action_type, timestamp);
CREATE INDEX user_actions_resource ON user_actions (resource, timestamp);
CREATE INDEX user_actions_outcome ON user_actions (outcome, timestamp);
