//! The supervision tree: what happens when its actors end. Reaches for actors that no client can touch.

use std::{collections::HashMap, net::SocketAddr, pin::Pin, time::Duration};

use futures_util::{SinkExt, StreamExt};
use ractor::ActorRef;
use serde_json::{Value, json, value::RawValue};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest, protocol::Role},
};
use uuid::Uuid;

use super::*;
use crate::{
    auth::{Identity, Logout, Remote},
    cluster::Audience,
    connection::{Admission, socket},
    handlers::{AnyHandler, Caller, Outcome},
    hub::Outbox,
    protocol::{CloseReason, Format, ReplyHead},
    store::{ActionFilter, ActionPage},
};

type Client = WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>;

struct Running {
    server: Server,
    root: ActorRef<()>,
    ended: JoinHandle<()>,
    address: SocketAddr,
    token: String,
    _accepting: Accepting,
    _data: TempDir,
}

fn config(data: &TempDir, more: &[(&'static str, &str)]) -> Config {
    let mut settings = HashMap::from([
        ("LISTEN_ADDR", "127.0.0.1:0"),
        ("DATA_DIR", data.path().to_str().unwrap()),
        ("DRAIN_GRACE", "100ms"),
    ]);
    settings.extend(more.iter().copied());
    Config::read(|name| settings.get(name).map(|text| (*text).to_owned())).unwrap()
}

async fn start() -> Running {
    start_with(&[]).await
}

async fn start_with(more: &[(&'static str, &str)]) -> Running {
    let data = TempDir::new().unwrap();
    let config = config(&data, more);
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let address = listeners.clients.local_addr().unwrap();
    let issuer = DevIssuer::open(&config.auth.dev_key_file, &config.auth.client_id).unwrap();
    let token = issuer.token("ann", &[], Duration::from_secs(600));
    let server = Server::open(config, crate::handlers::packages()).await.unwrap();
    let (root, ended) = Actor::spawn(None, server.root(), ()).await.unwrap();
    let accepting = server.accept(listeners);
    Running { server, root, ended, address, token, _accepting: accepting, _data: data }
}

impl Running {
    async fn client(&self) -> Client {
        client(self.address, &self.token).await
    }

    fn restarts(&self, actor: &str) -> u64 {
        let text = String::from_utf8(self.server.shared.metrics.render()).unwrap();
        let series = format!("actor_restarts_total{{actor=\"{actor}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&series));
        line.unwrap().parse().unwrap()
    }

    async fn until_restarted(&self, actor: &str, times: u64) {
        for _ in 0..250 {
            if self.restarts(actor) == times {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{actor} was started again {} times, not {times}", self.restarts(actor));
    }
}

async fn client(address: SocketAddr, token: &str) -> Client {
    let mut request = format!("ws://{address}/web").into_client_request().unwrap();
    let bearer = format!("Bearer {token}").parse().unwrap();
    request.headers_mut().insert("authorization", bearer);
    let (mut client, _) = connect_async(request).await.unwrap();
    assert_eq!(json_of(client.next().await.unwrap().unwrap())["type"], "auth_ok");
    client
}

fn json_of(frame: Message) -> Value {
    serde_json::from_str(frame.to_text().unwrap()).unwrap()
}

fn request(pkg_id: i32) -> Message {
    Message::text(json!({ "pkg_id": pkg_id, "req_id": Uuid::new_v4() }).to_string())
}

async fn echo(client: &mut Client) -> Value {
    client.send(request(100)).await.unwrap();
    json_of(client.next().await.unwrap().unwrap())
}

#[tokio::test]
async fn handlers_and_registry_are_started_again_and_connections_end_with_1011() {
    let running = start().await;
    let mut client = running.client().await;
    assert_eq!(echo(&mut client).await["status_code"], 0);

    for actor in running.root.get_cell().get_children() {
        actor.kill();
    }
    match client.next().await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1011),
        other => panic!("a close frame was expected: {other:?}"),
    }
    running.until_restarted("handler", 6).await;
    running.until_restarted("registry", 1).await;
    assert_eq!(running.server.context.hub.len(), 0);

    let mut client = running.client().await;
    assert_eq!(echo(&mut client).await["status_code"], 0);
    assert_eq!(running.server.shared.metrics.ws.connections_active.get(), 1);
}

#[tokio::test]
async fn a_handler_that_ends_leaves_connections_open() {
    let running = start().await;
    let mut client = running.client().await;
    let children = running.root.get_cell().get_children();
    let before = children.len();
    // The registry is started last.
    let registry = children.iter().map(ractor::ActorCell::get_id).max().unwrap();
    for actor in children.iter().filter(|actor| actor.get_id() != registry) {
        actor.kill();
    }
    running.until_restarted("handler", 6).await;
    assert_eq!(running.restarts("registry"), 0);
    assert_eq!(running.root.get_cell().get_children().len(), before);
    assert_eq!(echo(&mut client).await["status_code"], 0);
}

#[tokio::test]
async fn a_link_that_ends_is_started_again_and_nobody_notices() {
    // Nobody listens there.
    let running = start_with(&[("REDIS_URL", "redis://127.0.0.1:1")]).await;
    let mut client = running.client().await;
    let mut children = running.root.get_cell().get_children();
    children.sort_unstable_by_key(ractor::ActorCell::get_id);
    // It comes after the writer of the audit trail.
    children[1].kill();
    running.until_restarted("cluster", 1).await;
    running.server.context.cluster.push(150, &1, &Audience::All).unwrap();
    assert_eq!(json_of(client.next().await.unwrap().unwrap())["pkg_id"], 150);
    assert_eq!(echo(&mut client).await["status_code"], 0);
    assert_eq!(running.server.context.cluster.is_connected(), Some(false));
}

#[tokio::test]
async fn a_change_of_a_package_that_does_not_say_who_may_see_it_is_pushed_to_nobody() {
    let running = start().await;
    let mut client = running.client().await;
    let cluster = &running.server.context.cluster;
    assert_eq!(cluster.push(100, &1, &Audience::Viewers { except: None }).unwrap(), 0);
    assert_eq!(cluster.push(150, &1, &Audience::All).unwrap(), 1);
    assert_eq!(json_of(client.next().await.unwrap().unwrap())["pkg_id"], 150);
}

#[tokio::test]
async fn what_was_summed_up_outlives_the_writer_of_the_audit_trail() {
    let running = start_with(&[("AUDIT_SUMMARY_INTERVAL", "1s")]).await;
    let refused = format!("http://{}/authors", running.address);
    let refused = async || {
        let bad = reqwest::Client::new().get(&refused).bearer_auth("bad.token.here");
        assert_eq!(bad.send().await.unwrap().status(), 401);
    };
    refused().await;
    let mut children = running.root.get_cell().get_children();
    children.sort_unstable_by_key(ractor::ActorCell::get_id);
    children[0].kill();
    running.until_restarted("audit", 1).await;
    refused().await;
    let rows = loop {
        let all = ActionFilter::default();
        let part = running.server.context.store.actions(&all, &ActionPage::Offset(0), 10).await;
        let rows = part.unwrap().items;
        if !rows.is_empty() {
            break rows;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let data: Value =
        serde_json::from_str(rows[0].action.request_data.as_ref().unwrap().get()).unwrap();
    assert_eq!((rows.len(), &data["times"]), (1, &json!(2)));
}

#[tokio::test]
async fn connections_that_lose_their_supervisor_end_and_the_registry_is_started_again() {
    let running = start().await;
    let mut client = running.client().await;
    let children = running.root.get_cell().get_children();
    let registry = children.iter().max_by_key(|actor| actor.get_id()).unwrap();
    for supervisor in registry.get_children() {
        supervisor.kill();
    }
    match client.next().await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1011),
        other => panic!("a close frame was expected: {other:?}"),
    }
    running.until_restarted("registry", 1).await;
    assert_eq!(running.server.context.hub.len(), 0);
    assert_eq!(echo(&mut running.client().await).await["status_code"], 0);
}

#[tokio::test]
async fn restarts_that_do_not_help_end_the_root() {
    let running = start().await;
    for _ in 0..20 {
        for actor in running.root.get_cell().get_children() {
            actor.kill();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::timeout(Duration::from_secs(5), running.ended).await.unwrap().unwrap();
}

/// A socket of the session `s1` that was checked and is to be admitted, and its client.
async fn checked(server: &Server) -> (Box<Admission>, WebSocketStream<TcpStream>) {
    let identity = Arc::new(Identity {
        subject: "ann".into(),
        issuer: "issuer".into(),
        session: Some("s1".into()),
        username: "ann".into(),
        roles: [].into(),
        issued_at: 0,
        expires_at: u64::MAX,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let remote = Remote {
        address: [127, 0, 0, 1].into(),
        user_agent: None,
        correlation: "c".into(),
        trace: None,
    };
    let outbox =
        Outbox::new(Uuid::nil(), Arc::clone(&identity), Format::Json, 1, Arc::new(remote), 0);
    let admission = Box::new(Admission {
        socket: socket::accept(tcp, &[], 1024).await,
        budget: server.shared.limits.messages(&identity.subject).await,
        lease: None,
        identity,
        outbox: Arc::new(outbox),
    });
    (admission, client)
}

#[tokio::test]
async fn a_registry_that_is_started_again_during_a_drain_admits_nobody() {
    let running = start_with(&[("DRAIN_GRACE", "20s"), ("DRAIN_SPREAD", "0s")]).await;
    let mut client = running.client().await;
    let (admission, _late) = checked(&running.server).await;
    let late = async {
        assert_eq!(json_of(client.next().await.unwrap().unwrap())["type"], "drain");
        let children = running.root.get_cell().get_children();
        children.iter().max_by_key(|actor| actor.get_id()).unwrap().kill();
        running.until_restarted("registry", 1).await;
        // It was told once, and ends with its registry.
        match client.next().await {
            Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1011),
            other => panic!("a close frame was expected: {other:?}"),
        }
        let place = Arc::clone(&running.server.bounds.places).try_acquire_owned().unwrap();
        let (refused, refusal) = tokio::sync::oneshot::channel();
        let admit = RegistryMessage::Admit { admission, place, refused };
        assert!(running.server.registry.tell(admit).is_ok());
        let refused = refusal.await.ok().map(|(_, reason)| reason);
        assert_eq!(refused, Some(CloseReason::GoingAway));
        assert_eq!(running.server.context.hub.len(), 0);
    };
    tokio::join!(running.server.drain(), late);
}

#[tokio::test]
async fn a_session_that_ends_between_its_check_and_its_admission_is_closed() {
    let running = start().await;
    let server = &running.server;
    let logout = Logout::Session("s1".into());
    server.validator.revoke(&logout);
    let found = server.context.hub.close_of(|user| logout.ends(user), CloseReason::SessionRevoked);
    assert_eq!(found, 0);

    let (admission, mut client) = checked(server).await;
    let place = Arc::clone(&server.bounds.places).try_acquire_owned().unwrap();
    let (refused, _) = tokio::sync::oneshot::channel();
    assert!(server.registry.tell(RegistryMessage::Admit { admission, place, refused }).is_ok());

    let last = async {
        let mut last = None;
        while let Some(Ok(frame)) = client.next().await {
            last = Some(frame);
        }
        last
    };
    match tokio::time::timeout(Duration::from_secs(5), last).await.expect("it stays open") {
        Some(Message::Close(Some(frame))) => assert_eq!(u16::from(frame.code), 4004),
        other => panic!("a close frame was expected: {other:?}"),
    }
}

/// A package whose actor dies of every request.
struct Deadly;

impl AnyHandler for Deadly {
    fn start(
        self: Arc<Self>,
        _: Arc<Context>,
        _: Arc<Caller>,
        _: ReplyHead,
        _: Option<Box<RawValue>>,
    ) -> Pin<Box<dyn Future<Output = Outcome> + Send>> {
        panic!("on purpose");
    }
}

#[tokio::test]
async fn a_server_whose_actors_keep_dying_answers_every_request_and_gives_up() {
    let data = TempDir::new().unwrap();
    let config = config(&data, &[]);
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let address = listeners.clients.local_addr().unwrap();
    let issuer = DevIssuer::open(&config.auth.dev_key_file, &config.auth.client_id).unwrap();
    let token = issuer.token("ann", &[], Duration::from_secs(600));
    let mut packages = crate::handlers::packages();
    packages.push(Package { id: 900, handler: Arc::new(Deadly), ..packages[5].clone() });
    let running = tokio::spawn(run(config, packages, listeners, std::future::pending()));
    let mut client = client(address, &token).await;
    let end = loop {
        client.send(request(900)).await.unwrap();
        match client.next().await.unwrap().unwrap() {
            Message::Close(end) => break end.unwrap(),
            answer => assert_eq!(json_of(answer)["data"]["code"], "internal_error"),
        }
    };
    assert_eq!(u16::from(end.code), 1011);
    let ended = tokio::time::timeout(Duration::from_secs(20), running).await.unwrap();
    assert!(matches!(ended.unwrap(), Err(ServeError::Supervision)));
}

#[tokio::test]
async fn a_crowd_waits_in_the_kernel_while_nobody_accepts() {
    let data = TempDir::new().unwrap();
    let listeners = Listeners::bind(&config(&data, &[]).server).await.unwrap();
    let address = listeners.clients.local_addr().unwrap();
    let mut crowd = Vec::new();
    for number in 0..400 {
        // One for which there is no place tries again after a second.
        let came = tokio::time::timeout(Duration::from_millis(900), TcpStream::connect(address));
        crowd.push(came.await.unwrap_or_else(|_| panic!("no place for {number}")).unwrap());
    }
}
