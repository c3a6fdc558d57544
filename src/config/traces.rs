//! Traces: where they go, and how many of them.

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::{
    Reader,
    value::{Value, WebAddress},
};

/// Where traces go, and how many of them.
#[derive(Debug, Clone)]
pub struct TracesConfig {
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`, without a slash at its end.
    pub endpoint: String,
    /// `OTEL_EXPORTER_OTLP_HEADERS`, whose values are shown to nobody.
    pub headers: HeaderMap,
    /// `OTEL_SERVICE_NAME`.
    pub service: String,
    /// `OTEL_TRACES_SAMPLER_ARG`.
    pub ratio: f64,
}

impl Reader<'_> {
    /// None: no traces.
    pub(super) fn traces(&mut self) -> Option<TracesConfig> {
        let endpoint: Option<WebAddress> = self.get("OTEL_EXPORTER_OTLP_ENDPOINT");
        let Headers(headers) = self.get("OTEL_EXPORTER_OTLP_HEADERS");
        let service = self.get("OTEL_SERVICE_NAME");
        let Ratio(ratio) = self.get("OTEL_TRACES_SAMPLER_ARG");
        let WebAddress(endpoint) = endpoint?;
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Some(TracesConfig { endpoint, headers, service, ratio })
    }
}

/// A part of all.
struct Ratio(f64);

impl Value for Ratio {
    const ALLOWED: &'static str = "a number from 0 to 1 such as 0.1";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio)).map(Self)
    }
}

/// Headers of requests, with percent-encoding in their values, as OpenTelemetry writes them.
struct Headers(HeaderMap);

impl Value for Headers {
    const ALLOWED: &'static str =
        "headers such as authorization=Bearer%20TOKEN,x-tenant=a, separated by commas";

    fn read(text: &str) -> Option<Self> {
        let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
        let headers: Option<HeaderMap> = pairs.map(header).collect();
        headers.map(Self)
    }
}

fn header(pair: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = pair.split_once('=')?;
    let value = percent_encoding::percent_decode_str(value.trim()).decode_utf8().ok()?;
    let mut value = HeaderValue::from_str(&value).ok()?;
    value.set_sensitive(true);
    Some((name.trim().parse().ok()?, value))
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
    const RATIO: &str = "OTEL_TRACES_SAMPLER_ARG";

    fn read(settings: &[(&str, &str)]) -> Result<Config, String> {
        Config::read(|name| {
            settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
        .map_err(|faults| faults.to_string())
    }

    #[test]
    fn there_are_no_traces_without_an_endpoint() {
        assert!(read(&[(RATIO, "0.5")]).unwrap().traces.is_none());
        let traces = read(&[(ENDPOINT, "http://collector:4318/")]).unwrap().traces.unwrap();
        assert_eq!((&*traces.endpoint, &*traces.service), ("http://collector:4318", "switchboard"));
        assert!((traces.ratio - 1.0).abs() < f64::EPSILON && traces.headers.is_empty());
    }

    #[test]
    fn headers_are_decoded_and_not_shown() {
        let headers = "authorization=Basic%20aHVzaA==, x-tenant = a ,";
        let config = read(&[(ENDPOINT, "http://c"), (HEADERS, headers)]).unwrap();
        assert!(!format!("{config:?}").contains("aHVzaA"));
        let headers = config.traces.unwrap().headers;
        assert_eq!((headers.len(), &headers["x-tenant"]), (2, &"a".parse().unwrap()));
        assert_eq!(headers["authorization"], "Basic aHVzaA==");
    }

    #[test]
    fn what_is_no_endpoint_no_header_and_no_ratio_is_a_fault() {
        for (name, value) in [
            (ENDPOINT, "collector:4318"),
            (ENDPOINT, "http://ann:hush-hush@collector"),
            (HEADERS, "hush-hush"),
            (HEADERS, "a b=hush-hush"),
            (HEADERS, "a=hush-hush%0a"),
            (RATIO, "1.1"),
            (RATIO, "-0.1"),
            (RATIO, "NaN"),
            (RATIO, "half"),
        ] {
            let fault = read(&[(name, value)]).unwrap_err();
            assert!(fault.contains(name) && !fault.contains("hush-hush"), "{fault}");
        }
    }
}
