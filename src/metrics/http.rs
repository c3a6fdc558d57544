//! What happens on HTTP. Labels come from the route table, never from the request.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prometheus::{HistogramVec, IntCounterVec, IntGauge, IntGaugeVec};

use super::{Counters, Family, HTTP_BUCKETS, Label, parts::label};

const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// Which route a request took, for its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    method: &'static str,
    route: String,
}

impl Endpoint {
    /// Folds unknown methods to `OTHER` and unrouted paths to `unmatched`.
    pub(crate) fn new(method: &str, route: Option<&str>) -> Self {
        let method = METHODS.iter().find(|known| **known == method).unwrap_or(&"OTHER");
        Self { method, route: route.unwrap_or("unmatched").to_owned() }
    }

    /// The route's template (`/authors/{id}`), or `unmatched`.
    pub(crate) fn route(&self) -> &str {
        &self.route
    }

    fn labels(&self) -> [&str; 2] {
        [self.method, &self.route]
    }
}

/// One handle lives as long as its request; the gauge is the number of handles.
type InProgress = Arc<Mutex<Vec<(Endpoint, Arc<()>)>>>;

label!(
    /// Why a connection was not let in: there are too many, or too many of its address.
    HttpRefusal { Capacity = "capacity", Address = "address" }
);

label!(
    /// Why a forwarding header does not count.
    ForwardedFault { Unreadable = "unreadable", UntrustedPeer = "untrusted_peer" }
);

/// The series of all HTTP requests.
#[derive(Clone)]
pub(crate) struct HttpMetrics {
    pub(crate) connections_active: IntGauge,
    pub(crate) refused: Counters<HttpRefusal>,
    pub(crate) body_bytes: IntGauge,
    pub(crate) forwarded_ignored: Counters<ForwardedFault>,
    requests: IntCounterVec,
    duration: HistogramVec,
    in_progress: IntGaugeVec,
    handles: InProgress,
}

impl HttpMetrics {
    pub(super) fn new(family: &Family) -> Self {
        let labels = &["method", "endpoint"];
        Self {
            connections_active: family.gauge(
                "http_connections_active",
                "Open HTTP connections, those of WebSockets until their upgrade.",
            ),
            refused: family.counters(
                "http_connections_refused_total",
                "HTTP connections closed because there were too many, of all or of one address.",
                "reason",
            ),
            body_bytes: family
                .gauge("http_body_memory_bytes", "Bytes of request bodies that are being read."),
            forwarded_ignored: family.counters(
                "forwarded_headers_ignored_total",
                "Requests with an X-Forwarded-For or Forwarded that does not count.",
                "reason",
            ),
            requests: family.counter_vec(
                "http_requests_total",
                "HTTP requests by route and status; WebSocket upgrades count with 101.",
                &["method", "endpoint", "status_code"],
            ),
            duration: family.histogram_vec(
                "http_request_duration_seconds",
                "Seconds from request to response, without WebSocket upgrades.",
                HTTP_BUCKETS,
                labels,
            ),
            in_progress: family.gauge_vec(
                "http_requests_in_progress",
                "HTTP requests being answered.",
                labels,
            ),
            handles: InProgress::default(),
        }
    }

    /// Makes the series of a route, with 0, for the statuses that it can answer.
    pub(crate) fn declare(&self, method: &str, route: &str, statuses: &[u16]) {
        let endpoint = Endpoint::new(method, Some(route));
        for status in statuses {
            self.count(&endpoint, *status, 0);
        }
        if !statuses.contains(&101) {
            self.duration.with_label_values(&endpoint.labels());
        }
        drop(self.begin(&endpoint));
    }

    /// Holds a request in `http_requests_in_progress` for as long as the handle lives.
    pub(crate) fn begin(&self, endpoint: &Endpoint) -> Arc<()> {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        match handles.iter().find(|(known, _)| known == endpoint) {
            Some((_, handle)) => Arc::clone(handle),
            None => {
                let handle = Arc::new(());
                handles.push((endpoint.clone(), Arc::clone(&handle)));
                handle
            }
        }
    }

    /// Counts a response. An upgrade has no duration: it lives as long as its socket.
    pub(crate) fn finish(&self, endpoint: &Endpoint, status: u16, took: Duration) {
        self.count(endpoint, status, 1);
        if status != 101 {
            self.duration.with_label_values(&endpoint.labels()).observe(took.as_secs_f64());
        }
    }

    fn count(&self, endpoint: &Endpoint, status: u16, by: u64) {
        let [method, route] = endpoint.labels();
        self.requests.with_label_values(&[method, route, &status.to_string()]).inc_by(by);
    }

    pub(super) fn set_in_progress(&self) {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        for (endpoint, handle) in handles.iter() {
            let requests = Arc::strong_count(handle).saturating_sub(1);
            let requests = i64::try_from(requests).unwrap_or(i64::MAX);
            self.in_progress.with_label_values(&endpoint.labels()).set(requests);
        }
    }
}
