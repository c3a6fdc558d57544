//! The command line: `serve`, `token`, `packages`, `config`. Everything else is the library's.

use std::{collections::HashMap, fs, process::ExitCode};

use anyhow::Context as _;
use clap::{Arg, ArgMatches, Command};
use switchboard::{
    auth::DevIssuer,
    config::{Config, ConfigErrors, SETTINGS, Source, Sources},
    handlers::{self, roles},
    machine,
    server::{self, Listeners},
    telemetry,
};
use tokio::signal::unix::{SignalKind, signal};

/// Open files beside WebSocket connections: the database, REST clients, a margin.
const OTHER_FILES: u64 = 200;
/// `EX_USAGE` of sysexits.h: the configuration is wrong.
const EXIT_CONFIG: u8 = 64;

fn main() -> ExitCode {
    let matches = command().get_matches();
    match dispatch(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            let config = error.is::<ConfigErrors>();
            ExitCode::from(if config { EXIT_CONFIG } else { 1 })
        }
    }
}

fn command() -> Command {
    let file = Arg::new("CONFIG_FILE")
        .long("config-file")
        .value_name("PATH")
        .env("CONFIG_FILE")
        .help("A TOML file of settings, keys in lower case");
    let settings: Vec<_> = SETTINGS
        .iter()
        .map(|setting| {
            let default = if setting.default.is_empty() { "empty" } else { setting.default };
            Arg::new(setting.name)
                .long(setting.flag())
                .value_name(setting.value)
                .allow_hyphen_values(true)
                .help(format!("{} [env: {}] [default: {default}]", setting.help, setting.name))
        })
        .chain([file])
        .collect();
    let token = Command::new("token")
        .about("Prints a token of the development issuer")
        .arg(
            Arg::new("user").long("user").value_name("NAME").required(true).help("The user's name"),
        )
        .arg(
            Arg::new("roles")
                .long("roles")
                .value_name("LIST")
                .value_delimiter(',')
                .help(format!("Separated by commas [default: {}]", roles::ALL.join(","))),
        )
        .arg(
            Arg::new("ttl")
                .long("ttl")
                .value_name("DURATION")
                .default_value("1h")
                .help("How long it is valid"),
        );
    Command::new("switchboard")
        .about("An actor-based real-time WebSocket server")
        .version(env!("CARGO_PKG_VERSION"))
        .args(&settings)
        .subcommand(
            Command::new("serve").about("Serves until SIGTERM or SIGINT (default)").args(&settings),
        )
        .subcommand(token.args(&settings))
        .subcommand(Command::new("packages").about("Lists the packages that clients can call"))
        .subcommand(
            Command::new("config")
                .about("Prints the effective configuration and where each value comes from")
                .args(&settings),
        )
}

fn dispatch(matches: &ArgMatches) -> anyhow::Result<()> {
    match matches.subcommand() {
        None => serve(&sources(&[matches])),
        Some(("serve", own)) => serve(&sources(&[matches, own])),
        Some(("token", own)) => token(&sources(&[matches, own]), own),
        Some(("packages", _)) => print_packages(),
        Some(("config", own)) => print_config(&sources(&[matches, own])),
        Some((name, _)) => anyhow::bail!("{name} is not a command"),
    }
}

/// Flags may stand before and after the command; those after it win.
fn sources(levels: &[&ArgMatches]) -> Sources {
    let get = |name: &str| levels.iter().rev().find_map(|level| level.get_one::<String>(name));
    let flags: HashMap<_, _> = SETTINGS
        .iter()
        .filter_map(|setting| Some((setting.name.to_owned(), get(setting.name)?.clone())))
        .collect();
    let file = get("CONFIG_FILE").map(|path| (path.as_str(), fs::read_to_string(path)));
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Sources::new(flags, environment, file)
}

fn serve(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    telemetry::install(&config.log, config.environment);
    let files = machine::raise_file_limit();
    let needed = config.ws.max_connections as u64 + OTHER_FILES;
    if let Some(limit) = files.filter(|files| *files < needed) {
        tracing::warn!(limit, needed, "the limit of open files is below WS_MAX_CONNECTIONS");
    }
    let one_core = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
    // On one core, workers would only pass work to themselves.
    let mut builder = match one_core {
        true => tokio::runtime::Builder::new_current_thread(),
        false => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = builder.enable_all().build()?;
    // Spawned: a future of `block_on` runs beside the workers, and every wake of it crosses threads.
    runtime.block_on(async { tokio::spawn(serve_until_signal(config)).await? })
}

async fn serve_until_signal(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listeners = Listeners::bind(&config.server).await.context("cannot listen")?;
    let address = listeners.clients.local_addr()?;
    tracing::info!(
        %address,
        development_tokens = config.auth.provider.is_none(),
        "listening"
    );
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("a second signal: ending at once");
            std::process::exit(1);
        });
    };
    server::run(config, handlers::packages(), listeners, shutdown).await?;
    Ok(())
}

fn token(sources: &Sources, own: &ArgMatches) -> anyhow::Result<()> {
    let config = sources.config()?;
    let user = own.get_one::<String>("user").context("--user is required")?;
    let roles: Vec<&str> = match own.get_many::<String>("roles") {
        Some(roles) => roles.map(|role| role.trim()).filter(|role| !role.is_empty()).collect(),
        None => roles::ALL.to_vec(),
    };
    let ttl = own.get_one::<String>("ttl").context("--ttl has a default")?;
    let ttl = switchboard::config::duration(ttl).map_err(|allowed| {
        ConfigErrors::one(format!("--ttl: {ttl:?} is not allowed; allowed: {allowed}"))
    })?;
    println!("{}", issuer(&config)?.token(user, &roles, ttl));
    Ok(())
}

fn issuer(config: &Config) -> anyhow::Result<DevIssuer> {
    if let Some(provider) = &config.auth.provider {
        let issuer = &provider.issuer;
        return Err(ConfigErrors::one(format!(
            "development tokens are not trusted where an issuer is configured: get one from {issuer}"
        ))
        .into());
    }
    DevIssuer::open(&config.auth.dev_key_file, &config.auth.client_id)
        .context("cannot use the development key")
}

fn print_packages() -> anyhow::Result<()> {
    let row = |id: &str, name: &str, roles: &str, input: &str, output: &str| {
        println!("{id:>6}  {name:<22} {roles:<14} {input:<52} {output}");
    };
    row("pkg_id", "name", "roles", "input", "output");
    for package in handlers::packages() {
        let roles = if package.roles.is_empty() { "-".to_owned() } else { package.roles.join(",") };
        row(&package.id.to_string(), package.name, &roles, package.input, package.output);
    }
    Ok(())
}

fn print_config(sources: &Sources) -> anyhow::Result<()> {
    for setting in SETTINGS {
        let (text, source) =
            sources.get(setting.name).unwrap_or((setting.default, Source::Default));
        let text = setting.shown(text);
        let source = match source {
            Source::Flag => "flag",
            Source::Environment => "environment",
            Source::File => "file",
            Source::Default => "default",
        };
        println!("{} = {text:?} # {source}", setting.key());
    }
    sources.config()?;
    Ok(())
}
