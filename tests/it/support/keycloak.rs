//! The Keycloak that `tests/keycloak.sh` runs: its tokens, what its administrators do, its end and return.

use std::{
    env,
    net::SocketAddr,
    process::{Command, Stdio},
    time::Instant,
};

use form_urlencoded::Serializer;
use jsonwebtoken::{dangerous::insecure_decode, decode_header};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, redirect::Policy};
use serde_json::{Value, json};

use super::TestServer;

pub(crate) const REALM: &str = "switchboard";
const CLIENT: &str = "switchboard";
/// The client of browsers.
pub(crate) const BROWSERS: &str = "switchboard-web";
/// The secret of the client, as the realm's file has it.
pub(crate) const SECRET: &str = "development";

/// The password of a user of the realm's file.
pub(crate) fn password(user: &str) -> String {
    format!("{user}-development")
}

/// A handle; Keycloak itself outlives the test.
pub(crate) struct Keycloak {
    url: String,
    http: Client,
}

/// What a login or a refresh brings.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    pub(crate) access: String,
    pub(crate) refresh: String,
}

impl Tokens {
    pub(crate) fn from(body: &Value) -> Self {
        let text = |name: &str| match body[name].as_str() {
            Some(token) => token.to_owned(),
            None => panic!("no {name}: {body}"),
        };
        Self { access: text("access_token"), refresh: text("refresh_token") }
    }

    /// The session that the access token belongs to.
    pub(crate) fn session(&self) -> String {
        let claims: Value = insecure_decode(&self.access).unwrap().claims;
        claims["sid"].as_str().expect("the realm's access tokens have a sid").to_owned()
    }

    /// The key that signed the access token.
    pub(crate) fn key_id(&self) -> String {
        decode_header(&self.access).unwrap().kid.unwrap()
    }
}

impl Keycloak {
    /// The running one, as the realm's file says; started again if a test left it down.
    pub(crate) async fn up() -> Self {
        let url = variable("KEYCLOAK_TEST_URL");
        // Where a browser is sent to is for the tests to see.
        let http = Client::builder().no_proxy().redirect(Policy::none()).build().unwrap();
        let keycloak = Self { url, http };
        if keycloak.http.get(&keycloak.url).send().await.is_err() {
            keycloak.start().await;
        }
        keycloak.forget_failures().await;
        keycloak.sign_with("").await;
        keycloak.set_secret(SECRET).await;
        keycloak
    }

    /// A Switchboard whose users log in here, and which is told of their logouts.
    pub(crate) async fn server(&self) -> TestServer {
        self.server_with(&[]).await
    }

    /// The same, with more settings.
    pub(crate) async fn server_with(&self, more: &[(&str, &str)]) -> TestServer {
        let settings = [
            ("KEYCLOAK_BASE_URL", &*self.url),
            ("KEYCLOAK_REALM", REALM),
            ("KEYCLOAK_CLIENT_SECRET", SECRET),
            ("JWT_AUDIENCE", CLIENT),
            ("BACKCHANNEL_CLIENTS", BROWSERS),
            ("WS_BROADCAST_CHANGES", "false"),
            ("AUTH_FAILURES_PER_MINUTE", "0"),
        ];
        let server = TestServer::start(&[&settings, more].concat()).await;
        for client in [CLIENT, BROWSERS] {
            self.call_back(client, server.addr).await;
        }
        server
    }

    /// What Prometheus is told.
    pub(crate) async fn metrics(&self) -> String {
        let url = format!("{}/metrics", variable("KEYCLOAK_TEST_MANAGEMENT_URL"));
        self.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// Asks for tokens as any client may, past Switchboard.
    pub(crate) async fn tokens(&self, form: &[(&str, &str)]) -> Response {
        self.token_of(REALM, form).await
    }

    async fn token_of(&self, realm: &str, form: &[(&str, &str)]) -> Response {
        let url = format!("{}/realms/{realm}/protocol/openid-connect/token", self.url);
        let body = Serializer::new(String::new()).extend_pairs(form).finish();
        let kind = "application/x-www-form-urlencoded";
        self.http.post(url).header("content-type", kind).body(body).send().await.unwrap()
    }

    /// Ends every session of a user; returns when it was asked to.
    pub(crate) async fn log_out(&self, user: &str) -> Instant {
        let path = format!("/users/{}/logout", self.user(user).await);
        self.end(self.admin(Method::POST, &path).await).await
    }

    /// Ends one session; returns when it was asked to.
    pub(crate) async fn end_session(&self, session: &str) -> Instant {
        self.end(self.admin(Method::DELETE, &format!("/sessions/{session}")).await).await
    }

    async fn end(&self, request: RequestBuilder) -> Instant {
        let since = Instant::now();
        self.done(request).await;
        since
    }

    /// Gives a user a role of the client, or takes it away.
    pub(crate) async fn set_role(&self, user: &str, role: &str, given: bool) {
        let client = self.client().await["id"].as_str().unwrap().to_owned();
        let role = self.get(&format!("/clients/{client}/roles/{role}")).await;
        let path = format!("/users/{}/role-mappings/clients/{client}", self.user(user).await);
        let method = if given { Method::POST } else { Method::DELETE };
        self.done(self.admin(method, &path).await.json(&json!([role]))).await;
    }

    /// Lets a user log in, or not. Their sessions end, but Keycloak tells no client of it.
    pub(crate) async fn set_enabled(&self, user: &str, enabled: bool) {
        let path = format!("/users/{}", self.user(user).await);
        self.done(self.admin(Method::PUT, &path).await.json(&json!({ "enabled": enabled }))).await;
    }

    /// Unlocks users who gave wrong passwords.
    pub(crate) async fn forget_failures(&self) {
        let path = "/attack-detection/brute-force/users";
        self.done(self.admin(Method::DELETE, path).await).await;
    }

    /// Makes a key that signs from now on; the older ones are published still.
    pub(crate) async fn rotate_keys(&self) {
        let path = "/components?type=org.keycloak.keys.KeyProvider";
        let known = self.get(path).await.as_array().unwrap().len();
        let key = json!({
            "name": format!("rotated-{known}"),
            "providerId": "rsa-generated",
            "providerType": "org.keycloak.keys.KeyProvider",
            "config": { "priority": [(200 + known).to_string()], "algorithm": ["RS256"] },
        });
        self.done(self.admin(Method::POST, "/components").await.json(&key)).await;
    }

    /// Withdraws the realm's signing keys but the newest: they are no longer published.
    pub(crate) async fn withdraw_old_keys(&self) {
        let keys = self.get("/components?type=org.keycloak.keys.KeyProvider").await;
        let priority = |key: &Value| -> i64 {
            key["config"]["priority"][0].as_str().unwrap().parse().unwrap()
        };
        let mut signing: Vec<_> = keys.as_array().unwrap().clone();
        // The imported key has no algorithm, which means RS256; others are for clients that asked.
        let realms =
            |key: &Value| key["config"]["algorithm"][0].as_str().unwrap_or("RS256") == "RS256";
        signing.retain(|key| key["providerId"] == "rsa-generated" && realms(key));
        signing.sort_by_key(priority);
        signing.pop();
        for mut key in signing {
            key["config"]["enabled"] = json!(["false"]);
            let path = format!("/components/{}", key["id"].as_str().unwrap());
            self.done(self.admin(Method::PUT, &path).await.json(&key)).await;
        }
    }

    /// Makes Keycloak sign the client's access tokens with an algorithm; empty: the realm's.
    pub(crate) async fn sign_with(&self, algorithm: &str) {
        self.set_attribute(CLIENT, "access.token.signed.response.alg", algorithm).await;
    }

    /// Gives the client another secret.
    pub(crate) async fn set_secret(&self, secret: &str) {
        self.change(CLIENT, |client| client["secret"] = json!(secret)).await;
    }

    /// Lets a client get tokens for passwords, or not.
    pub(crate) async fn set_password_grant(&self, client: &str, allowed: bool) {
        self.change(client, |client| client["directAccessGrantsEnabled"] = json!(allowed)).await;
    }

    /// Changes a client of the realm.
    async fn change(&self, client: &str, change: impl FnOnce(&mut Value)) {
        let mut client = self.get(&format!("/clients?clientId={client}")).await[0].take();
        change(&mut client);
        let path = format!("/clients/{}", client["id"].as_str().unwrap());
        self.done(self.admin(Method::PUT, &path).await.json(&client)).await;
    }

    /// Tells Keycloak where the client wants to hear of logouts: a test's port is known only when it listens.
    async fn call_back(&self, client: &str, addr: SocketAddr) {
        let url = format!("http://{addr}/auth/backchannel-logout");
        self.set_attribute(client, "backchannel.logout.url", &url).await;
    }

    async fn set_attribute(&self, client: &str, name: &str, value: &str) {
        self.change(client, |client| client["attributes"][name] = json!(value)).await;
    }

    /// A new user, without a password and roles.
    pub(crate) async fn add_user(&self, name: &str, email: &str) {
        let body = json!({ "username": name, "email": email, "enabled": true });
        self.done(self.admin(Method::POST, "/users").await.json(&body)).await;
    }

    /// Gives a user a password as an administrator would; the answer says whether the policy allows it.
    pub(crate) async fn set_password(&self, user: &str, password: &str) -> StatusCode {
        let path = format!("/users/{}/reset-password", self.user(user).await);
        let body = json!({ "type": "password", "value": password, "temporary": false });
        self.admin(Method::PUT, &path).await.json(&body).send().await.unwrap().status()
    }

    /// Opens the page to which a client sends a browser, with these parameters.
    pub(crate) async fn login_page(&self, query: &[(&str, &str)]) -> Response {
        let query = Serializer::new(String::new()).extend_pairs(query).finish();
        let url = format!("{}/realms/{REALM}/protocol/openid-connect/auth?{query}", self.url);
        self.http.get(url).send().await.unwrap()
    }

    /// Fills in the form of a login page, as a browser would.
    pub(crate) async fn fill_in(&self, page: Response, form: &[(&str, &str)]) -> Response {
        let cookies = page.headers().get_all("set-cookie").iter();
        let cookies: Vec<_> =
            cookies.map(|it| it.to_str().unwrap().split(';').next().unwrap().to_owned()).collect();
        let text = page.text().await.unwrap();
        let action = text.split("action=\"").nth(1).unwrap_or_else(|| panic!("no form: {text}"));
        let action = action.split('"').next().unwrap().replace("&amp;", "&");
        let kind = "application/x-www-form-urlencoded";
        let request = self.http.post(action).header("content-type", kind);
        let body = Serializer::new(String::new()).extend_pairs(form).finish();
        request.header("cookie", cookies.join("; ")).body(body).send().await.unwrap()
    }

    /// What another client learns of a user.
    pub(crate) async fn id_token(&self, client: &str, user: &str) -> Value {
        let found = self.get(&format!("/clients?clientId={client}")).await;
        let client = found[0]["id"].as_str().unwrap_or_else(|| panic!("no client {client}"));
        let evaluate = format!("/clients/{client}/evaluate-scopes/generate-example-id-token");
        self.get(&format!("{evaluate}?scope=openid&userId={}", self.user(user).await)).await
    }

    async fn client(&self) -> Value {
        self.get(&format!("/clients?clientId={CLIENT}")).await[0].take()
    }

    /// The id of a user by name.
    async fn user(&self, name: &str) -> String {
        let found = self.get(&format!("/users?exact=true&username={name}")).await;
        found[0]["id"].as_str().unwrap_or_else(|| panic!("no user {name}")).to_owned()
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.admin(Method::GET, path).await.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        answer.json().await.unwrap()
    }

    async fn done(&self, request: RequestBuilder) {
        let answer = request.send().await.unwrap();
        let (status, url) = (answer.status(), answer.url().clone());
        assert!(status.is_success(), "{url}: {status} {}", answer.text().await.unwrap());
    }

    /// A call of the realm's admin API.
    async fn admin(&self, method: Method, path: &str) -> RequestBuilder {
        let token = self.admin_token().await;
        let url = format!("{}/admin/realms/{REALM}{path}", self.url);
        self.http.request(method, url).bearer_auth(token)
    }

    /// A new one for each call: they live for a minute.
    pub(crate) async fn admin_token(&self) -> String {
        let (user, password) =
            (variable("KEYCLOAK_TEST_ADMIN"), variable("KEYCLOAK_TEST_ADMIN_PASSWORD"));
        let form = [
            ("grant_type", "password"),
            ("client_id", "admin-cli"),
            ("username", &user),
            ("password", &password),
        ];
        let body: Value = self.token_of("master", &form).await.json().await.unwrap();
        body["access_token"].as_str().unwrap_or_else(|| panic!("no admin: {body}")).to_owned()
    }

    /// Stops it. Keys, users and sessions are there again after [`Self::start`].
    pub(crate) async fn stop(&self) {
        control("stop").await;
    }

    /// Starts it and waits until the realm answers.
    pub(crate) async fn start(&self) {
        control("start").await;
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run tests/keycloak.sh"))
}

async fn control(command: &'static str) {
    let ran = tokio::task::spawn_blocking(move || {
        Command::new("bash")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/keycloak.sh"))
            .arg(command)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    });
    let ran = ran.await.unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "keycloak.sh {command}: {said}");
}
