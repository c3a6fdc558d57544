//! The numbers of the protocol and of the REST API, where nothing is set.

use std::time::Duration;

use switchboard::config::{AllowList, Config};

fn config() -> Config {
    Config::read(|_| None).unwrap()
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn the_limits_of_the_protocol_hold_where_nothing_is_set() {
    let Config { ws, handlers, .. } = config();
    for (name, seen, promised) in [
        ("WS_AUTH_TIMEOUT", ws.auth_timeout, seconds(5)),
        ("WS_EXPIRY_WARNING", ws.expiry_warning, seconds(60)),
        ("WS_HANDLER_TIMEOUT", handlers.timeout, seconds(10)),
        ("WS_WRITE_TIMEOUT", ws.write_timeout, seconds(10)),
        ("WS_PING_INTERVAL", ws.ping_interval, seconds(25)),
        ("WS_PONG_TIMEOUT", ws.pong_timeout, seconds(10)),
    ] {
        assert_eq!(seen, promised, "{name}");
    }
    assert_eq!(ws.max_connections_per_user, 5);
    assert_eq!(ws.message_rate_limit, 6000);
    assert_eq!(ws.max_strikes, 20);
    assert_eq!(ws.max_in_flight, 16);
    assert_eq!(ws.send_queue, 256);
    assert_eq!(ws.send_bytes, 1024 * 1024);
    assert_eq!(ws.max_message_bytes, 64 * 1024);
    assert!(!ws.query_token, "a token in a URL ends in access logs");
    assert_eq!(ws.allowed_origins, AllowList::All);
    assert!(handlers.broadcast_changes);
    assert_eq!(handlers.max_rows, 10_000);
}

#[test]
fn the_limits_of_the_rest_api_hold_where_nothing_is_set() {
    let http = config().http;
    assert_eq!((http.rate_limit_per_minute, http.rate_limit_burst), (60, 10));
    assert_eq!(http.max_body_bytes, 1024 * 1024);
    assert_eq!(http.allowed_hosts, AllowList::All);
    assert_eq!(http.cors_allowed_origins, AllowList::Only(Vec::new()));
    assert!(http.trusted_proxies.is_empty());
}

#[test]
fn a_server_listens_for_its_own_machine_and_drains_in_half_a_minute_where_nothing_is_set() {
    let server = config().server;
    assert_eq!((server.listen_addr, server.ops_addr), (([127, 0, 0, 1], 8000).into(), None));
    assert_eq!((server.drain_spread, server.drain_timeout), (seconds(10), seconds(30)));
    assert_eq!((server.drain_delay, server.ready_after), (seconds(0), seconds(5)));
    let redis = |name: &str| (name == "REDIS_URL").then(|| "redis://127.0.0.1".to_owned());
    assert_eq!(Config::read(redis).unwrap().server.drain_delay, seconds(5), "a balancer is told");
}

#[test]
fn the_audit_trail_is_on_and_kept_for_a_year_where_nothing_is_set() {
    let Config { audit, .. } = config();
    assert!(audit.enabled && !audit.reads);
    assert_eq!((audit.batch_size, audit.batch_timeout), (100, seconds(1)));
    assert_eq!(audit.retention, Some(seconds(365 * 86_400)));
}
