//! The way to the collector: the HTTP client of the exporter, on this program's own.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use reqwest::{Client, header::HeaderMap};
use tokio::runtime::Handle;

use crate::{
    config::TracesConfig,
    outbound::{client, with_causes},
};

/// Of each attempt, and of all attempts to export a batch.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);
/// A collector that is down is no news each time.
const BETWEEN_WARNINGS: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Collector {
    http: Client,
    endpoint: String,
    headers: HeaderMap,
    runtime: Handle,
    warned: Mutex<Option<Instant>>,
}

impl Collector {
    pub(super) fn new(config: &TracesConfig) -> reqwest::Result<Self> {
        Ok(Self {
            http: client(&config.endpoint, TIMEOUT)?,
            endpoint: config.endpoint.clone(),
            headers: config.headers.clone(),
            runtime: Handle::current(),
            warned: Mutex::default(),
        })
    }

    fn warn(&self, error: &str) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|last| last.elapsed() >= BETWEEN_WARNINGS) {
            *warned = Some(Instant::now());
            tracing::warn!(collector = self.endpoint, error, "spans cannot be exported");
        }
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        request.headers_mut().extend(self.headers.clone());
        // Whoever asks is a thread without a reactor.
        let answer = self.runtime.spawn(send(self.http.clone(), request)).await?;
        match &answer {
            Ok(answer) if answer.status().is_success() => {}
            Ok(answer) => self.warn(&format!("it answered {}", answer.status())),
            Err(error) => self.warn(&with_causes(error)),
        }
        Ok(answer?)
    }
}

async fn send(http: Client, request: Request<Bytes>) -> reqwest::Result<Response<Bytes>> {
    let answer = http.execute(request.try_into()?).await?;
    let (status, headers) = (answer.status(), answer.headers().clone());
    let mut answer = Response::new(answer.bytes().await?);
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    Ok(answer)
}
