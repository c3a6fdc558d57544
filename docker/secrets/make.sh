#!/usr/bin/env bash
# Makes the secrets of a production stack: docker/secrets/make.sh FOLDER. What is there stays as it is.
#
# Three are not random, and are taken from the environment: SLACK_URL (an incoming webhook), PAGERDUTY_KEY (the
# integration key of a service, Events API v2), and OPERATORS (lines of `htpasswd -nB NAME`: who may open
# Prometheus, Alertmanager and Traefik).
set -euo pipefail

folder=${1:?"usage: $0 FOLDER"}
mkdir -p "$folder"
# Containers have users of their own, who have to read the files; the folder keeps everybody else out.
chmod 700 "$folder"
umask 022

random() { od -An -N 24 -tx1 /dev/urandom | tr -d ' \n'; }
put() { [[ -e $folder/$1 ]] || printf '%s\n' "$2" >"$folder/$1"; }

put slack_url "${SLACK_URL:?the address of the chat for alerts}"
put pagerduty_key "${PAGERDUTY_KEY:?the key of the pager for critical alerts}"
put operators "${OPERATORS:?who may open the pages of operators}"
put database_url "postgres://switchboard:$(random)@postgres:5432/switchboard"
put redis_url "redis://default:$(random)@redis:6379/0"
for name in postgres_password postgres_keycloak_password postgres_grafana_password postgres_monitor_password \
    keycloak_admin_password grafana_admin_password grafana_client_secret switchboard_client_secret; do
    put "$name" "$(random)"
done
