//! An OpenID provider of the tests: real keys, a real HTTP server for discovery and key set, and
//! switches for what a real provider only does on a bad day.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der},
    rand::SystemRandom,
    rsa,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair,
    },
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header, jwk::Jwk};
use serde_json::{Value, json};
use switchboard::handlers::roles;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{bytes::Bytes, sync::CancellationToken};

use super::users::{Asked, Users};

/// The client that tokens are for.
pub(crate) const CLIENT: &str = "switchboard";

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// Claims that let in, with some replaced; null takes one away.
pub(crate) fn claims(issuer: &str, changes: &Value) -> Value {
    let mut claims = json!({
        "iss": issuer, "azp": CLIENT, "typ": "Bearer", "sub": "7a1f", "sid": "51d",
        "preferred_username": "ann", "iat": now(), "exp": now() + 600,
        "resource_access": { CLIENT: { "roles": roles::ALL } },
    });
    let object = claims.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        object.insert(name.clone(), value.clone());
        if value.is_null() {
            object.remove(name);
        }
    }
    claims
}

/// Making one takes a while, and nothing is tested about it.
static RSA: LazyLock<Vec<u8>> = LazyLock::new(|| rsa_key(rsa::KeySize::Rsa2048));

fn rsa_key(size: rsa::KeySize) -> Vec<u8> {
    AsDer::<Pkcs8V1Der<'_>>::as_der(&rsa::KeyPair::generate(size).unwrap())
        .unwrap()
        .as_ref()
        .to_vec()
}

/// A private key, and its public half as the issuer publishes it.
#[derive(Clone)]
pub(crate) struct SigningKey {
    pub(crate) kid: String,
    pub(crate) algorithm: Algorithm,
    pub(crate) key: EncodingKey,
    pub(crate) jwk: Value,
}

impl SigningKey {
    /// A new key; RSA keys are all the same one.
    pub(crate) fn new(kid: &str, algorithm: Algorithm) -> Self {
        let random = SystemRandom::new();
        let key = match algorithm {
            Algorithm::ES256 => {
                let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random);
                EncodingKey::from_ec_der(key.unwrap().as_ref())
            }
            Algorithm::ES384 => {
                let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &random);
                EncodingKey::from_ec_der(key.unwrap().as_ref())
            }
            Algorithm::EdDSA => {
                // Without the public key, as jsonwebtoken wants it.
                let key = Ed25519KeyPair::generate_pkcs8v1(&random);
                EncodingKey::from_ed_der(key.unwrap().as_ref())
            }
            _ => rsa_encoding(&RSA),
        };
        Self::of(kid, algorithm, key)
    }

    /// An RSA key in RS256 that is not the one that all others are.
    pub(crate) fn other_rsa(kid: &str) -> Self {
        Self::of(kid, Algorithm::RS256, rsa_encoding(&rsa_key(rsa::KeySize::Rsa2048)))
    }

    fn of(kid: &str, algorithm: Algorithm, key: EncodingKey) -> Self {
        let mut jwk = Jwk::from_encoding_key(&key, algorithm).unwrap();
        jwk.common.key_id = Some(kid.to_owned());
        let mut jwk = serde_json::to_value(jwk).unwrap();
        jwk["use"] = json!("sig");
        Self { kid: kid.to_owned(), algorithm, key, jwk }
    }

    /// Its public half with members replaced; null takes one away.
    pub(crate) fn published_with(mut self, changes: Value) -> Self {
        for (name, value) in changes.as_object().unwrap() {
            self.jwk[name] = value.clone();
            if value.is_null() {
                self.jwk.as_object_mut().unwrap().remove(name);
            }
        }
        self
    }

    /// The public half of an RSA key as PEM, with a line end as files have it.
    pub(crate) fn public_pem(&self) -> Vec<u8> {
        let number =
            |name: &str| BASE64_URL_SAFE_NO_PAD.decode(self.jwk[name].as_str().unwrap()).unwrap();
        let public = rsa::PublicKeyComponents { n: number("n"), e: number("e") };
        let der: PublicKeyX509Der<'_> = public.as_der().unwrap();
        pem::encode_config(
            &pem::Pem::new("PUBLIC KEY", der.as_ref()),
            pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
        )
        .into_bytes()
    }

    /// Signs claims in its algorithm.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        self.sign_as(&Header::new(self.algorithm), claims)
    }

    /// Signs claims under a header, to which the `kid` is added.
    pub(crate) fn sign_as(&self, header: &Header, claims: &Value) -> String {
        let header = Header { kid: Some(self.kid.clone()), ..header.clone() };
        jsonwebtoken::encode(&header, claims, &self.key).unwrap()
    }
}

fn rsa_encoding(pkcs8: &[u8]) -> EncodingKey {
    let pem = pem::encode(&pem::Pem::new("PRIVATE KEY", pkcs8));
    EncodingKey::from_rsa_pem(pem.as_bytes()).unwrap()
}

/// What the issuer answers for its key set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// The keys.
    Well,
    /// The keys, after a while. So with logins.
    Slow(Duration),
    /// Half of a JSON.
    Broken,
    /// 500, also for discovery and logins.
    Failing,
    /// The keys, and 500 for logins.
    LoginsFailing,
}

struct State {
    keys: Mutex<Vec<SigningKey>>,
    mood: Mutex<Mood>,
    /// What discovery says, where that is not the address.
    name: Mutex<Option<String>>,
    /// Seconds that its clock is ahead.
    ahead: AtomicI64,
    users: Users,
    discoveries: AtomicUsize,
    key_sets: AtomicUsize,
}

/// The issuer. It ends with the test.
pub(crate) struct Issuer {
    pub(crate) addr: SocketAddr,
    state: Arc<State>,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl Issuer {
    /// An issuer with one key, `rsa` in RS256.
    pub(crate) async fn start() -> Self {
        Self::with(vec![SigningKey::new("rsa", Algorithm::RS256)]).await
    }

    /// An issuer with these keys.
    pub(crate) async fn with(keys: Vec<SigningKey>) -> Self {
        let state = State {
            keys: Mutex::new(keys),
            mood: Mutex::new(Mood::Well),
            name: Mutex::default(),
            ahead: AtomicI64::new(0),
            users: Users::default(),
            discoveries: AtomicUsize::new(0),
            key_sets: AtomicUsize::new(0),
        };
        let addr = "127.0.0.1:0".parse().unwrap();
        let mut issuer = Self { addr, state: Arc::new(state), running: None };
        issuer.up().await;
        issuer
    }

    /// Its `iss`, and where it is.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/realms/test", self.addr)
    }

    /// The settings of a server that trusts it.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        vec![("OIDC_ISSUER", self.url())]
    }

    /// Goes to its address, the same after [`Self::down`].
    pub(crate) async fn up(&mut self) {
        let listener = TcpListener::bind(self.addr).await.unwrap();
        self.addr = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = serve(listener, Arc::clone(&self.state), self.url(), stop.clone());
        self.running = Some((stop, tokio::spawn(serving)));
    }

    /// Stops listening and drops every connection.
    pub(crate) async fn down(&mut self) {
        let (stop, running) = self.running.take().unwrap();
        stop.cancel();
        running.await.unwrap();
    }

    pub(crate) fn set_mood(&self, mood: Mood) {
        *self.state.mood.lock().unwrap() = mood;
    }

    /// Publishes other keys.
    pub(crate) fn publish(&self, keys: Vec<SigningKey>) {
        *self.state.keys.lock().unwrap() = keys;
    }

    /// What discovery gives as the issuer, and as the beginning of its endpoints.
    pub(crate) fn set_name(&self, name: &str) {
        *self.state.name.lock().unwrap() = Some(name.to_owned());
    }

    /// Sets its clock ahead.
    pub(crate) fn set_ahead(&self, seconds: i64) {
        self.state.ahead.store(seconds, Ordering::SeqCst);
    }

    /// The first key.
    pub(crate) fn key(&self) -> SigningKey {
        self.state.keys.lock().unwrap()[0].clone()
    }

    /// Its users.
    pub(crate) fn users(&self) -> &Users {
        &self.state.users
    }

    /// A token of the first key with every role, and with some claims replaced.
    pub(crate) fn token(&self, changes: Value) -> String {
        self.key().sign(&claims(&self.url(), &changes))
    }

    /// Requests for the discovery document.
    pub(crate) fn discoveries(&self) -> usize {
        self.state.discoveries.load(Ordering::SeqCst)
    }

    /// Requests for the key set.
    pub(crate) fn key_sets(&self) -> usize {
        self.state.key_sets.load(Ordering::SeqCst)
    }
}

async fn serve(listener: TcpListener, state: Arc<State>, url: String, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (state, url, stop) = (Arc::clone(&state), url.clone(), stop.clone());
        let service = service_fn(move |request| answer(Arc::clone(&state), url.clone(), request));
        let io = TokioIo::new(accepted.unwrap().0);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                _ = http1::Builder::new().serve_connection(io, service) => {}
            }
        });
    }
}

async fn answer(
    state: Arc<State>,
    url: String,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let mood = *state.mood.lock().unwrap();
    let (status, body) = match request.uri().path() {
        "/realms/test/.well-known/openid-configuration" => {
            state.discoveries.fetch_add(1, Ordering::SeqCst);
            let name = state.name.lock().unwrap().clone().unwrap_or(url);
            let document = json!({
                "issuer": name,
                "jwks_uri": format!("{name}/certs"),
                "token_endpoint": format!("{name}/token"),
                "end_session_endpoint": format!("{name}/logout"),
            });
            (if mood == Mood::Failing { 500 } else { 200 }, document.to_string())
        }
        "/realms/test/certs" => {
            state.key_sets.fetch_add(1, Ordering::SeqCst);
            if let Mood::Slow(time) = mood {
                tokio::time::sleep(time).await;
            }
            let keys: Vec<_> =
                state.keys.lock().unwrap().iter().map(|key| key.jwk.clone()).collect();
            let keys = json!({ "keys": keys }).to_string();
            match mood {
                Mood::Broken => (200, keys[..keys.len() / 2].to_owned()),
                Mood::Failing => (500, String::new()),
                Mood::Well | Mood::Slow(_) | Mood::LoginsFailing => (200, keys),
            }
        }
        path @ ("/realms/test/token" | "/realms/test/logout") => {
            let path = path.rsplit('/').next().unwrap().to_owned();
            let header = |name| {
                let value = request.headers().get(name);
                value.map(|value| value.to_str().unwrap().to_owned())
            };
            let (correlation, traceparent) = (header("x-correlation-id"), header("traceparent"));
            let body = request.into_body().collect().await.unwrap().to_bytes();
            if let Mood::Slow(time) = mood {
                tokio::time::sleep(time).await;
            }
            let form = form_urlencoded::parse(&body).into_owned().collect();
            let key = state.keys.lock().unwrap()[0].clone();
            let (status, body) = state.users.answer(
                &url,
                Asked { path, correlation, traceparent, form },
                |changes| key.sign(&claims(&url, &changes)),
            );
            (if matches!(mood, Mood::Failing | Mood::LoginsFailing) { 500 } else { status }, body)
        }
        _ => (404, String::new()),
    };
    let date = jiff::Timestamp::from_second(now() + state.ahead.load(Ordering::SeqCst)).unwrap();
    let date = date.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let answer = Response::builder().status(status).header("date", date);
    Ok(answer.body(Full::new(body.into())).unwrap())
}
