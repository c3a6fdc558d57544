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
-- Switchboard makes its tables later; Grafana reads them, for the dashboard of the audit trail.
ALTER DEFAULT PRIVILEGES FOR ROLE switchboard GRANT SELECT ON TABLES TO grafana;
SQL
