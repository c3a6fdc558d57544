//! The identity provider over HTTP. Every call is measured, and passes the circuit breaker.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use reqwest::{Client, Request, RequestBuilder, StatusCode, header};
use serde::Deserialize;

use crate::{
    breaker::Breaker,
    config::ProviderConfig,
    metrics::{BreakerSeries, Histograms, ProviderOperation},
    objects,
    outbound::{client, with_causes},
    traces::{Traces, called},
};

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 1024 * 1024;
/// How long the circuit breaker stays open, at first and at most.
const BREAKER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));

/// An OpenID provider, such as a realm of Keycloak.
pub(crate) struct Provider {
    config: ProviderConfig,
    http: Client,
    breaker: Breaker,
    endpoints: ArcSwapOption<Endpoints>,
    duration: Histograms<ProviderOperation>,
    traces: Option<Arc<Traces>>,
}

/// Where the provider is asked what, as its discovery document has it.
#[derive(Deserialize)]
struct Endpoints {
    issuer: String,
    jwks_uri: String,
    /// Without these two, tokens are checked all the same.
    token_endpoint: Option<String>,
    end_session_endpoint: Option<String>,
}

/// An answer that is not the provider's own failure; its status may say that ours is at fault.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Vec<u8>,
}

/// Why the provider gave no answer that is of use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProviderError {
    /// Nobody was asked.
    #[error("its circuit breaker is open")]
    BreakerOpen,
    /// It could not be reached, or did not answer in time.
    #[error("{}", with_causes(.0))]
    Unreachable(#[from] reqwest::Error),
    /// It answered with a status that is none of success.
    #[error("{url} answered {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// What came back.
        status: StatusCode,
    },
    /// Its answer cannot be read.
    #[error("{0}")]
    Malformed(String),
    /// It publishes none that could have signed a token.
    #[error("its key set has no key that signs tokens")]
    NoKeys,
}

impl ProviderError {
    /// Whether an endpoint may have moved, so that the next call asks where it is. Not after a failure
    /// in its place: a discovery that succeeds before every call that fails would keep the breaker closed.
    fn has_moved(&self) -> bool {
        match self {
            Self::BreakerOpen => false,
            Self::Unreachable(error) => error.is_connect(),
            Self::Status { status, .. } => status.is_client_error(),
            Self::Malformed(_) | Self::NoKeys => true,
        }
    }
}

impl Provider {
    /// Calls take `timeout` at most.
    pub(crate) fn new(
        config: &ProviderConfig,
        timeout: Duration,
        breaker: BreakerSeries,
        duration: Histograms<ProviderOperation>,
        traces: Option<Arc<Traces>>,
    ) -> reqwest::Result<Self> {
        Ok(Self {
            config: config.clone(),
            http: client(&config.address, timeout)?,
            breaker: Breaker::new("keycloak", BREAKER, breaker),
            endpoints: ArcSwapOption::empty(),
            duration,
            traces,
        })
    }

    /// The `iss` of its tokens.
    pub(super) fn issuer(&self) -> &str {
        &self.config.issuer
    }

    /// Where it says what it is.
    pub(super) fn discovery_url(&self) -> String {
        format!("{}/.well-known/openid-configuration", self.config.address)
    }

    /// The client of all calls.
    pub(super) fn http(&self) -> &Client {
        &self.http
    }

    /// The text of its key set.
    pub(super) async fn keys(&self) -> Result<Vec<u8>, ProviderError> {
        let endpoints = self.endpoints().await?;
        let keys = self.read(&endpoints.jwks_uri).await;
        if keys.as_ref().is_err_and(ProviderError::has_moved) {
            self.endpoints.store(None);
        }
        keys
    }

    /// Posts the client's form to the endpoint of an operation, with its secret where it has one.
    pub(super) async fn post(
        &self,
        operation: ProviderOperation,
        form: &[(&str, &str)],
        correlation: &str,
    ) -> Result<Answer, ProviderError> {
        let endpoints = self.endpoints().await?;
        let (name, url) = match operation {
            ProviderOperation::Logout => ("end_session_endpoint", &endpoints.end_session_endpoint),
            _ => ("token_endpoint", &endpoints.token_endpoint),
        };
        let url = url.as_ref().ok_or_else(|| {
            ProviderError::Malformed(format!("its discovery document has no {name}"))
        })?;
        let request = self
            .http
            .post(url)
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(self.body(form));
        let answer = self.call(operation, request, Some(correlation)).await;
        let moved = match &answer {
            Ok(answer) => answer.status == StatusCode::NOT_FOUND,
            Err(error) => error.has_moved(),
        };
        if moved {
            self.endpoints.store(None);
        }
        answer
    }

    fn body(&self, form: &[(&str, &str)]) -> String {
        let mut body = form_urlencoded::Serializer::new(String::new());
        body.extend_pairs(form);
        if let Some(secret) = &self.config.client_secret {
            body.append_pair("client_secret", secret.expose());
        }
        body.finish()
    }

    async fn endpoints(&self) -> Result<Arc<Endpoints>, ProviderError> {
        if let Some(known) = self.endpoints.load_full() {
            return Ok(known);
        }
        let url = self.discovery_url();
        let text = self.read(&url).await?;
        let mut endpoints: Endpoints = objects::read_bytes(&text).map_err(|error| {
            ProviderError::Malformed(format!("{url} is no discovery document: {error}"))
        })?;
        let ProviderConfig { issuer, address, .. } = &self.config;
        if endpoints.issuer != *issuer && endpoints.issuer != *address {
            return Err(ProviderError::Malformed(format!(
                "{url} is of the issuer {}, not {issuer}: set OIDC_ISSUER to what its tokens bear",
                endpoints.issuer
            )));
        }
        endpoints.jwks_uri = self.reachable(endpoints.jwks_uri);
        // Keycloak names this one as browsers reach it, also to whoever asks from inside.
        let end = endpoints.end_session_endpoint.take();
        endpoints.end_session_endpoint = end.map(|url| self.reachable(url));
        endpoints.token_endpoint = endpoints.token_endpoint.take().map(|url| self.reachable(url));
        let endpoints = Arc::new(endpoints);
        self.endpoints.store(Some(Arc::clone(&endpoints)));
        Ok(endpoints)
    }

    /// An endpoint under the issuer's name, under the name by which this server reaches it.
    fn reachable(&self, endpoint: String) -> String {
        let issuer = self.config.issuer.trim_end_matches('/');
        match endpoint.strip_prefix(issuer) {
            Some(path) if path.starts_with('/') => format!("{}{path}", self.config.address),
            _ => endpoint,
        }
    }

    async fn read(&self, url: &str) -> Result<Vec<u8>, ProviderError> {
        let request = self.http.get(url).header(header::ACCEPT, "application/json");
        let answer = self.call(ProviderOperation::Keys, request, None).await?;
        match answer.status {
            StatusCode::OK => Ok(answer.body),
            status => Err(ProviderError::Status { url: url.to_owned(), status }),
        }
    }

    /// Every way to the provider: `correlation` goes along as `X-Correlation-ID`. That it refuses a
    /// request (4xx) is no failure of the provider.
    async fn call(
        &self,
        operation: ProviderOperation,
        mut request: RequestBuilder,
        correlation: Option<&str>,
    ) -> Result<Answer, ProviderError> {
        if !self.breaker.permits() {
            return Err(ProviderError::BreakerOpen);
        }
        if let Some(id) = correlation {
            request = request.header("x-correlation-id", id);
        }
        let started = Instant::now();
        let answer = answer(request, self.traces.as_deref()).await;
        self.duration.of(operation).observe(started.elapsed().as_secs_f64());
        match &answer {
            Ok(_) | Err(ProviderError::Malformed(_)) => self.breaker.succeeded(),
            Err(_) => self.breaker.failed(),
        }
        answer
    }
}

async fn answer(request: RequestBuilder, traces: Option<&Traces>) -> Result<Answer, ProviderError> {
    let (http, request) = request.build_split();
    let mut request = request?;
    let trace = traces.map(|traces| traces.call(&mut request));
    let answer = send(&http, request).await;
    if let Some(trace) = trace {
        let status = match &answer {
            Ok(Answer { status, .. }) | Err(ProviderError::Status { status, .. }) => Some(*status),
            Err(_) => None,
        };
        called(&trace, status);
    }
    answer
}

async fn send(http: &Client, request: Request) -> Result<Answer, ProviderError> {
    let mut response = http.execute(request).await?;
    let status = response.status();
    if status.is_server_error() {
        return Err(ProviderError::Status { url: response.url().to_string(), status });
    }
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await? {
        if body.len() + part.len() > MAX_ANSWER {
            let url = response.url();
            return Err(ProviderError::Malformed(format!("{url} answered too much")));
        }
        body.extend_from_slice(&part);
    }
    Ok(Answer { status, body })
}
