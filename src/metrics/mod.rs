//! Every metric of the server, under the fixed names that dashboards and alerts use.
//!
//! One [`Metrics`] belongs to one server: it is passed, never global. All series with a closed label
//! set exist from the start with 0. Counters and histograms are written where things happen; gauges
//! are set from the truth, at the latest when Prometheus asks ([`Metrics::render`]).

mod http;
mod identity;
mod parts;
mod ws;

use std::marker::PhantomData;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder, core::Collector,
};

use crate::telemetry;
pub(crate) use http::{Endpoint, ForwardedFault, HttpMetrics, HttpRefusal};
pub(crate) use identity::{
    AuthMetrics, AuthOutcome, BreakerMetrics, BreakerSeries, CallOutcome, Dependency,
    LoginCounters, LoginMethod, LoginOutcome, ProviderOperation, TokenOutcome,
};
pub(crate) use parts::{
    Actor, AuditErrorKind, AuditMetrics, AuditOutcome, DbErrorKind, DbMetrics, DbOperation,
    DbShare, DbTable, ErrorMetrics, LimitType, RedisMetrics, RedisOperation, RuntimeMetrics, Table,
};
pub(crate) use ws::{ConnectionOutcome, PackageMetrics, WsMetrics};

/// Seconds; 0.1 and 0.4 are the Apdex bounds of the dashboards.
const HTTP_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.4, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Seconds; an answer takes microseconds where it does not wait for the database.
const WS_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];

/// The metrics of one server.
pub struct Metrics {
    registry: Registry,
    pub(crate) http: HttpMetrics,
    pub(crate) ws: WsMetrics,
    pub(crate) db: DbMetrics,
    pub(crate) audit: AuditMetrics,
    pub(crate) redis: RedisMetrics,
    pub(crate) auth: AuthMetrics,
    pub(crate) breakers: BreakerMetrics,
    pub(crate) errors: ErrorMetrics,
    pub(crate) runtime: RuntimeMetrics,
    pub(crate) rate_limit_hits: Counters<LimitType>,
    pub(crate) actor_restarts: Counters<Actor>,
}

impl Metrics {
    /// Registers everything. `packages` are the ids and names of the table of packages,
    /// `environment` goes into `app_info`.
    pub fn new(packages: &[(i32, &'static str)], environment: &str) -> Self {
        let family = Family(Registry::new());
        let metrics = Self {
            http: HttpMetrics::new(&family),
            ws: WsMetrics::new(&family, packages),
            db: DbMetrics::new(&family),
            audit: AuditMetrics::new(&family),
            redis: RedisMetrics::new(&family),
            auth: AuthMetrics::new(&family),
            breakers: BreakerMetrics::new(&family),
            errors: ErrorMetrics::new(&family, packages),
            runtime: RuntimeMetrics::new(&family),
            rate_limit_hits: family.counters(
                "rate_limit_hits_total",
                "Requests, connections and messages refused by a limit.",
                "limit_type",
            ),
            actor_restarts: family.counters(
                "actor_restarts_total",
                "Actors restarted by their supervisor.",
                "actor",
            ),
            registry: family.0.clone(),
        };
        family
            .gauge_vec(
                "app_info",
                "What is running; always 1.",
                &["version", "rust_version", "environment"],
            )
            .with_label_values(&[env!("CARGO_PKG_VERSION"), env!("RUSTC_VERSION"), environment])
            .set(1);
        family.register(telemetry::DROPPED.clone());
        #[cfg(target_os = "linux")]
        family.register(prometheus::process_collector::ProcessCollector::for_self());
        metrics
    }

    /// The Prometheus text format. Whoever serves it sets the gauges of its parts first.
    pub fn render(&self) -> Vec<u8> {
        self.http.set_in_progress();
        let mut text = Vec::with_capacity(64 * 1024);
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("writing to a Vec cannot fail and every family is well formed");
        text
    }
}

/// A value of a closed label set.
pub(crate) trait Label: Copy + 'static {
    /// Every value, so that every series exists from the start.
    const ALL: &'static [Self];

    /// The value as Prometheus sees it.
    fn label(self) -> &'static str;
}

/// A counter family with one closed label.
#[derive(Clone)]
pub(crate) struct Counters<L>(IntCounterVec, PhantomData<L>);

impl<L: Label> Counters<L> {
    /// Counts one.
    pub(crate) fn inc(&self, label: L) {
        self.0.with_label_values(&[label.label()]).inc();
    }

    /// Counts some.
    pub(crate) fn inc_by(&self, label: L, count: u64) {
        self.0.with_label_values(&[label.label()]).inc_by(count);
    }
}

/// A histogram family with one closed label.
#[derive(Clone)]
pub(crate) struct Histograms<L>(HistogramVec, PhantomData<L>);

impl<L: Label> Histograms<L> {
    /// The series of one label.
    pub(crate) fn of(&self, label: L) -> Histogram {
        self.0.with_label_values(&[label.label()])
    }
}

/// Makes and registers families. Names are fixed at compile time, so a clash is a bug found by any test.
struct Family(Registry);

impl Family {
    fn register(&self, collector: impl Collector + 'static) {
        self.0.register(Box::new(collector)).expect("metric names are unique and well formed");
    }

    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("metric names are well formed");
        self.register(collector.clone());
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    fn counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram_vec(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(HistogramVec::new(opts, labels))
    }

    fn counters<L: Label>(&self, name: &str, help: &str, label: &str) -> Counters<L> {
        let family = self.counter_vec(name, help, &[label]);
        for value in L::ALL {
            family.with_label_values(&[value.label()]);
        }
        Counters(family, PhantomData)
    }

    fn histograms<L: Label>(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        label: &str,
    ) -> Histograms<L> {
        let family = self.histogram_vec(name, help, buckets, &[label]);
        for value in L::ALL {
            family.with_label_values(&[value.label()]);
        }
        Histograms(family, PhantomData)
    }
}
