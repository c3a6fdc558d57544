//! What a mode measures: a private server with its limits lifted, or the one that `--url` names.

use std::{
    fs,
    net::{SocketAddr, ToSocketAddrs as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    client::Client,
    http::Endpoint,
    machine::{self, Machine},
    mix::{ECHO, Mix},
    probe::Probe,
    script::{self, Script, Wire},
    server::{Program, Server, ServerOption, USERS},
};

#[derive(clap::Args)]
pub(crate) struct TargetOption {
    #[command(flatten)]
    server: ServerOption,
    /// Measure this server (http://HOST:PORT) with the limits it has [default: start a private one]
    #[arg(long, value_name = "URL", conflicts_with = "server")]
    url: Option<String>,
    /// With --url: access tokens, one a line; connections take them in turn
    #[arg(long, value_name = "FILE", requires = "url")]
    tokens: Option<PathBuf>,
    /// With --url: logins, USER:PASSWORD a line, for which the server asks its identity provider
    #[arg(long, value_name = "FILE", requires = "url", conflicts_with = "tokens")]
    logins: Option<PathBuf>,
    /// With --url: the server's process on this machine, whose CPU time the kernel knows to 10 ms
    #[arg(long, requires = "url")]
    pid: Option<u32>,
    /// With --url: where /metrics is, if OPS_ADDR is set [default: at the URL]
    #[arg(long, value_name = "URL", requires = "url")]
    metrics: Option<String>,
    /// Users of the private server
    #[arg(long, default_value_t = USERS as u16, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    users: u16,
    /// A setting of the private server, as its environment has it; may be given again
    #[arg(long = "set", value_name = "NAME=VALUE", conflicts_with = "url")]
    settings: Vec<String>,
    /// How requests travel
    #[arg(long, value_enum, default_value_t = Wire::Json)]
    pub(crate) wire: Wire,
}

impl TargetOption {
    /// Starts the private server, or finds out about the other. `settings` are the mode's own.
    pub(crate) fn start(&self, settings: &[(&str, &str)]) -> anyhow::Result<Target> {
        match &self.url {
            Some(url) => self.given(url),
            None => self.private(settings),
        }
    }

    /// The same for a mode that has no use for REST.
    pub(crate) fn start_sockets(&self, settings: &[(&str, &str)]) -> anyhow::Result<Target> {
        ensure!(self.wire != Wire::Rest, "this mode is about WebSockets: --wire json or protobuf");
        self.start(settings)
    }

    fn given(&self, url: &str) -> anyhow::Result<Target> {
        let endpoint = endpoint(url)?;
        let tokens = match (&self.tokens, &self.logins) {
            (Some(file), _) => lines(file)?,
            (_, Some(file)) => lines(file)?
                .iter()
                .map(|line| login(&endpoint, line))
                .collect::<anyhow::Result<_>>()?,
            _ => bail!(
                "{url} needs to know who comes: --tokens FILE (a line each; `switchboard token \
                 --user NAME` prints one of a development server) or --logins FILE"
            ),
        };
        let metrics = self.metrics.as_deref().map_or(Ok(endpoint.clone()), self::endpoint)?;
        let mut probe = Probe { pid: self.pid, metrics: Some(metrics) };
        if let Err(error) = probe.metric("process_resident_memory_bytes") {
            eprintln!("the server's memory is not known: {error:#}");
            probe.metrics = None;
        }
        let machine = Machine::with_another_server();
        let (wire, settings) = (self.wire, Vec::new());
        Ok(Target { endpoint, tokens, probe, wire, machine, settings, private: None })
    }

    fn private(&self, settings: &[(&str, &str)]) -> anyhow::Result<Target> {
        let given = self.settings.iter().map(|setting| {
            setting.split_once('=').with_context(|| format!("{setting}: NAME=VALUE"))
        });
        let given = given.collect::<anyhow::Result<Vec<_>>>()?;
        let settings = [settings, &given].concat();
        let program = self.server.program_for(self.users.into())?;
        let machine = Machine::new();
        let server = program.start_with(&machine, &settings)?;
        Ok(Target {
            endpoint: Endpoint::new(server.address),
            tokens: server.tokens.clone(),
            probe: server.probe.clone(),
            wire: self.wire,
            machine,
            settings: settings
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
            private: Some((server, program)),
        })
    }
}

pub(crate) struct Target {
    pub(crate) endpoint: Endpoint,
    pub(crate) tokens: Vec<String>,
    pub(crate) probe: Probe,
    wire: Wire,
    pub(crate) machine: Machine,
    /// Of the mode and of the command line.
    pub(crate) settings: Vec<(String, String)>,
    /// The server before the program, whose folder goes last.
    private: Option<(Server, Program)>,
}

impl Target {
    /// A client with the connections of a mode, which sends a mix.
    pub(crate) fn client(&self, mix: &Mix) -> anyhow::Result<Client> {
        self.client_of(mix, &self.tokens)
    }

    /// A client that asks nothing of its own.
    pub(crate) fn silent_client(&self) -> anyhow::Result<Client> {
        self.client(&Mix::parse(ECHO)?)
    }

    /// The same, of some users.
    pub(crate) fn client_of(&self, mix: &Mix, tokens: &[String]) -> anyhow::Result<Client> {
        let script = Script::new(&self.endpoint.host, self.wire, tokens, mix)?;
        Client::new(vec![self.endpoint.address], script, mix.parts().len())
    }

    /// What it is, for the report.
    pub(crate) fn description(&self) -> String {
        let wire = self.wire.name();
        match &self.private {
            Some(_) => format!("a private server with its limits lifted, {wire}"),
            None => format!("http://{}, {wire}, with the limits it has", self.endpoint.host),
        }
    }

    /// What a private server was started from.
    pub(crate) fn program(&self) -> Option<&Program> {
        self.private.as_ref().map(|(_, program)| program)
    }

    /// What the private server has printed.
    pub(crate) fn log(&self) -> String {
        self.private.as_ref().map_or_else(String::new, |(server, _)| server.log())
    }
}

/// Makes sure that this process can hold so many connections; those of the private server are its own.
pub(crate) fn allow_connections(connections: u32) -> anyhow::Result<usize> {
    let connections = connections as usize;
    machine::allow_connections(connections)?;
    Ok(connections)
}

fn endpoint(url: &str) -> anyhow::Result<Endpoint> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    ensure!(
        ["http", "ws"].contains(&scheme),
        "{url}: TLS is the proxy's work; name the server behind it, as http://HOST:PORT"
    );
    let host = rest.split('/').next().unwrap_or_default();
    let with_port = if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    let addresses = with_port.to_socket_addrs();
    let mut addresses = addresses.with_context(|| format!("{url}: the host is not known"))?;
    // A development server listens on IPv4 alone.
    let address = addresses.clone().find(SocketAddr::is_ipv4).or_else(|| addresses.next());
    let address = address.with_context(|| format!("{url}: the host has no address"))?;
    Ok(Endpoint { address, host: host.to_owned() })
}

fn lines(file: &Path) -> anyhow::Result<Vec<String>> {
    let text =
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.map(str::to_owned).collect();
    ensure!(!lines.is_empty(), "{} is empty", file.display());
    Ok(lines)
}

/// An access token for a line of `--logins`.
fn login(endpoint: &Endpoint, line: &str) -> anyhow::Result<String> {
    let (username, password) = line.split_once(':').context("a login is USER:PASSWORD")?;
    let body = serde_json::json!({ "username": username, "password": password }).to_string();
    let answer = endpoint.ask("POST /auth/login", None, Some(&body));
    let answer = answer.with_context(|| format!("{username} cannot log in"))?;
    let token = script::member(answer.as_bytes(), "access_token");
    Ok(token.context("the answer to a login has no token")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::endpoint;

    #[test]
    fn a_url_names_a_host_and_a_port() {
        let of = |url| endpoint(url).unwrap();
        assert_eq!(of("http://127.0.0.1:8000/").address.port(), 8000);
        assert_eq!(of("ws://127.0.0.1/web").address.port(), 80);
        assert_eq!(of("127.0.0.1:1").host, "127.0.0.1:1");
        assert!(endpoint("wss://127.0.0.1").is_err());
    }
}
