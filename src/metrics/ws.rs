//! What happens on WebSocket connections. The series of a message are resolved once, at the start.

use std::sync::Arc;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::{AuditOutcome, Counters, Family, Label, WS_BUCKETS};
use crate::protocol::{CloseReason, Status};

/// What became of an upgrade request or of the authentication after it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ConnectionOutcome {
    Accepted,
    RejectedAuth,
    RejectedAuthTimeout,
    RejectedLimit,
    RejectedOrigin,
    RejectedCapacity,
}

impl Label for ConnectionOutcome {
    const ALL: &'static [Self] = &[
        Self::Accepted,
        Self::RejectedAuth,
        Self::RejectedAuthTimeout,
        Self::RejectedLimit,
        Self::RejectedOrigin,
        Self::RejectedCapacity,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::RejectedAuth => "rejected_auth",
            Self::RejectedAuthTimeout => "rejected_auth_timeout",
            Self::RejectedLimit => "rejected_limit",
            Self::RejectedOrigin => "rejected_origin",
            Self::RejectedCapacity => "rejected_capacity",
        }
    }
}

/// The series of one package.
pub(crate) struct PackageMetrics {
    /// Seconds from decoded to answer ready.
    pub(crate) processing: Histogram,
    responses: [IntCounter; 4],
}

impl PackageMetrics {
    /// Counts an answer.
    pub(crate) fn answered(&self, status: Status) {
        self.responses[status as usize].inc();
    }
}

/// The series of all connections.
#[derive(Clone)]
pub(crate) struct WsMetrics {
    /// Written by the registry alone, from the size of its table.
    pub(crate) connections_active: IntGauge,
    pub(crate) connections_pending: IntGauge,
    pub(crate) connections: Counters<ConnectionOutcome>,
    disconnections: IntCounterVec,
    pub(crate) received: IntCounter,
    pub(crate) sent: IntCounter,
    pub(crate) phase_queue: Histogram,
    pub(crate) phase_handler: Histogram,
    pub(crate) phase_write: Histogram,
    pub(crate) requests_in_flight: IntGauge,
    /// Changes that went on after their client was told `timeout`, when they end.
    pub(crate) late_changes: Counters<AuditOutcome>,
    /// Pushes that found the lane of their connection full.
    pub(crate) dropped_slow_consumer: IntCounter,
    pub(crate) broadcast_errors: IntCounter,
    /// By id, for a binary search.
    packages: Vec<(i32, Arc<PackageMetrics>)>,
    unknown: Arc<PackageMetrics>,
}

impl WsMetrics {
    pub(super) fn new(family: &Family, packages: &[(i32, &'static str)]) -> Self {
        let disconnections = family.counter_vec(
            "ws_disconnections_total",
            "WebSocket connections that ended, by close code.",
            &["code"],
        );
        for reason in CloseReason::ALL {
            disconnections.with_label_values(&[reason.label()]);
        }
        let phase = family.histogram_vec(
            "ws_message_phase_duration_seconds",
            "Where the time of a message goes: waiting for the handler, in it, answer ready to flushed.",
            WS_BUCKETS,
            &["phase"],
        );
        let processing = family.histogram_vec(
            "ws_message_processing_duration_seconds",
            "From decoded to answer ready.",
            WS_BUCKETS,
            &["pkg_id"],
        );
        let responses = family.counter_vec(
            "ws_responses_total",
            "Answers by package and status_code.",
            &["pkg_id", "status_code"],
        );
        let package = |id: &str| {
            Arc::new(PackageMetrics {
                processing: processing.with_label_values(&[id]),
                responses: Status::ALL
                    .map(|status| responses.with_label_values(&[id, &(status as i32).to_string()])),
            })
        };
        Self {
            connections_active: family
                .gauge("ws_connections_active", "Open, authenticated WebSocket connections."),
            connections_pending: family
                .gauge("ws_connections_pending", "WebSockets that are still to authenticate."),
            connections: family.counters(
                "ws_connections_total",
                "WebSocket connections by what became of the request to open them.",
                "status",
            ),
            disconnections,
            received: family
                .counter("ws_messages_received_total", "Data messages received from clients."),
            sent: family
                .counter("ws_messages_sent_total", "Answers and pushes written to clients."),
            phase_queue: phase.with_label_values(&["queue"]),
            phase_handler: phase.with_label_values(&["handler"]),
            phase_write: phase.with_label_values(&["write"]),
            requests_in_flight: family
                .gauge("ws_requests_in_flight", "Requests accepted and not yet answered."),
            late_changes: family.counters(
                "ws_late_changes_total",
                "Changes that ended after their client was told `timeout`, by what came of them.",
                "outcome",
            ),
            dropped_slow_consumer: {
                let dropped = family.counter_vec(
                    "ws_send_queue_dropped_total",
                    "Pushes dropped because the lane of their connection was full.",
                    &["reason"],
                );
                dropped.with_label_values(&["slow_consumer"])
            },
            broadcast_errors: family.counter(
                "ws_broadcast_errors_total",
                "Pushes that could not be encoded or handed to other nodes, and events of other nodes \
                 that were not understood or name several users.",
            ),
            packages: {
                let mut packages: Vec<_> =
                    packages.iter().map(|(id, _)| (*id, package(&id.to_string()))).collect();
                packages.sort_by_key(|(id, _)| *id);
                packages
            },
            unknown: package("unknown"),
        }
    }

    /// The series of a package; those of `unknown` for an id that is not registered.
    pub(crate) fn package(&self, pkg_id: i32) -> Arc<PackageMetrics> {
        let found = self.packages.binary_search_by_key(&pkg_id, |(id, _)| *id);
        Arc::clone(found.map_or(&self.unknown, |at| &self.packages[at].1))
    }

    /// Counts the end of an admitted connection.
    pub(crate) fn disconnected(&self, reason: CloseReason) {
        self.disconnections.with_label_values(&[reason.label()]).inc();
    }
}
