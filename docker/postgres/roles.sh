#!/bin/sh
# Run by Postgres when its volume is empty: a role for each program, none of them more than it needs.
set -eu

secret() { cat "/run/secrets/$1"; }
# postgres://USER:PASSWORD@HOST/NAME
url=$(secret database_url)
password=${url#*://*:}
password=${password%%@*}

psql --set ON_ERROR_STOP=1 \
    --set switchboard="$password" \
    --set keycloak="$(secret postgres_keycloak_password)" \
    --set grafana="$(secret postgres_grafana_password)" \
    --set monitor="$(secret postgres_monitor_password)" <<'SQL'
CREATE ROLE switchboard LOGIN PASSWORD :'switchboard';
CREATE ROLE keycloak LOGIN PASSWORD :'keycloak';
CREATE ROLE grafana LOGIN PASSWORD :'grafana';
CREATE ROLE monitor LOGIN PASSWORD :'monitor' IN ROLE pg_monitor;
CREATE DATABASE switchboard OWNER switchboard;
CREATE DATABASE keycloak OWNER keycloak;
REVOKE CONNECT ON DATABASE switchboard, keycloak FROM PUBLIC;
GRANT CONNECT ON DATABASE switchboard TO grafana, monitor;
GRANT CONNECT ON DATABASE keycloak TO monitor;
\connect switchboard
-- The dashboard of the audit trail reads one table, which Switchboard makes later: default privileges would be for
-- all its tables. It runs as the role that makes the table, so the owner grants.
CREATE FUNCTION show_audit_trail() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity = 'public.user_actions') THEN
        GRANT SELECT ON public.user_actions TO grafana;
    END IF;
END
$$;
CREATE EVENT TRIGGER show_audit_trail ON ddl_command_end WHEN TAG IN ('CREATE TABLE')
    EXECUTE FUNCTION show_audit_trail();
SQL
