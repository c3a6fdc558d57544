//! The command line: `serve`, `migrate`, `audit export`, `audit erase`, `token`, `packages`, `config`, `doctor`,
//! `healthcheck`. Everything else is the library's.

mod commands;
mod signals;

use std::{
    collections::HashMap,
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
    process::ExitCode,
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ArgMatches;
use switchboard::{
    auth::DevIssuer,
    config::{Config, ConfigErrors, SETTINGS, Source, Sources},
    doctor::{self, Question},
    erase::{Erasure, Pseudonym, erase},
    export::{Format, Range, export},
    handlers::{self, roles},
    healthcheck, machine,
    migrate::{self, Migrated},
    server::{self, Listeners},
    store::{Part, Progress, Since, Until},
    telemetry,
};

use signals::Signals;

/// `EX_USAGE` of sysexits.h: the configuration is wrong.
const EXIT_CONFIG: u8 = 64;
/// Bytes of standard input at most; a token is smaller.
const MAX_INPUT: u64 = 64 * 1024;
/// Time for stderr to take the error that ends the process.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let matches = commands::all().get_matches();
    match dispatch(&matches) {
        Ok(code) => code,
        Err(error) => {
            complain(format!("{error:#}"));
            let config = error.is::<ConfigErrors>();
            ExitCode::from(if config { EXIT_CONFIG } else { 1 })
        }
    }
}

/// Writes to stderr, which nobody may read or which may be closed: neither keeps the process from its end.
fn complain(text: String) {
    let (written, wait) = mpsc::channel();
    thread::spawn(move || {
        let _ = writeln!(io::stderr(), "{text}");
        let _ = written.send(());
    });
    let _ = wait.recv_timeout(LAST_WORDS);
}

fn dispatch(matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    let done = match matches.subcommand() {
        None => serve(&sources(&[matches])),
        Some(("serve", own)) => serve(&sources(&[matches, own])),
        Some(("migrate", own)) => migrate_database(&sources(&[matches, own])),
        Some(("audit", audit)) => match audit.subcommand() {
            Some(("export", own)) => export_audit(&sources(&[matches, own]), own),
            Some(("erase", own)) => erase_audit(&sources(&[matches, own]), own),
            _ => anyhow::bail!("audit needs a command"),
        },
        Some(("token", own)) => token(&sources(&[matches, own]), own),
        Some(("packages", _)) => print_packages(),
        Some(("config", own)) => print_config(&sources(&[matches, own])),
        Some(("healthcheck", own)) => check_health(&sources(&[matches, own])),
        Some(("doctor", own)) => return examine(&sources(&[matches, own]), own),
        Some((name, _)) => anyhow::bail!("{name} is not a command"),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Flags may stand before and after the command; those after it win.
fn sources(levels: &[&ArgMatches]) -> Sources {
    let get = |name: &str| levels.iter().rev().find_map(|level| level.get_one::<String>(name));
    let flags: HashMap<_, _> = SETTINGS
        .iter()
        .filter_map(|setting| Some((setting.name.to_owned(), get(setting.name)?.clone())))
        .collect();
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let file = get("CONFIG_FILE").map(String::as_str);
    Sources::new(flags, environment, file, |path| fs::read_to_string(path))
}

fn serve(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    // Dropped after the runtime: what its end logs is written too.
    let _last_lines = telemetry::install(&config.log, config.environment)
        .context("cannot start the thread of the log")?;
    let files = machine::raise_file_limit();
    let needed = machine::files_needed(config.sockets());
    if let Some(limit) = files.filter(|files| *files < needed) {
        tracing::warn!(
            limit,
            needed,
            "the limit of open files is below WS_MAX_CONNECTIONS, WS_MAX_PENDING and HTTP_MAX_CONNECTIONS"
        );
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
    let signals = Signals::listen()?;
    let listeners = Listeners::bind(&config.server).await.context("cannot listen")?;
    let address = listeners.clients.local_addr()?;
    tracing::info!(
        %address,
        development_tokens = config.auth.provider.is_none(),
        "listening"
    );
    server::run(config, handlers::packages(), listeners, signals.stop()).await?;
    Ok(())
}

fn migrate_database(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let migrated = runtime.block_on(migrate::migrate(&config, &|progress| tell(progress)))?;
    let Migrated { schema, names } = migrated;
    if !schema.is_old() && names == 0 {
        let (has, needs) = (schema.has(), schema.needs());
        println!("nothing to do: the schema versions are {has}, this program needs {needs}");
    }
    for Part { history, pending, .. } in schema.0 {
        for version in pending {
            println!("{history} migration {version} was run");
        }
    }
    if names > 0 {
        println!("{names} names of authors were folded anew for searches");
    }
    Ok(())
}

/// Says how far a long migration is, every five seconds.
fn tell(progress: Progress) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_some_and(|last| last.elapsed() < Duration::from_secs(5)) {
        return;
    }
    *last = Some(Instant::now());
    match progress {
        Progress::Left(rows) => {
            println!("rows of the audit trail that get their integer id: {rows} left")
        }
        Progress::Indexes => println!("the audit trail gets its new indexes"),
        Progress::Locked => {
            println!("waiting for a lock: other sessions use the table user_actions")
        }
    }
}

fn export_audit(sources: &Sources, own: &ArgMatches) -> anyhow::Result<()> {
    let config = sources.config()?;
    let get = |name| own.get_one::<String>(name);
    let format = flag("format", get("format"), |name| Format::parse(&name))?;
    let range = Range {
        since: flag("since", get("since"), Since::try_from)?,
        until: flag("until", get("until"), Until::try_from)?,
    };
    if let (Some(since), Some(until)) = (&range.since, &range.until)
        && since.is_after(until)
    {
        return Err(ConfigErrors::one("--since: it is after --until; allowed: before it").into());
    }
    let format = format.context("--format has a default")?;
    let file = get("output").map(Path::new);
    // Not of one thread alone: the connection to Postgres is watched while a pipe is full.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    Ok(runtime.block_on(export(&config, &range, format, file))?)
}

fn erase_audit(sources: &Sources, own: &ArgMatches) -> anyhow::Result<()> {
    let config = sources.config()?;
    let name = |text: String| match text.is_empty() || text.contains('\0') {
        true => Err("a text that is not empty, without NUL"),
        false => Ok(text),
    };
    let subject =
        flag("subject", own.get_one("subject"), name)?.context("--subject is required")?;
    let usernames = own.get_many::<String>("username").unwrap_or_default();
    let usernames = usernames.filter_map(|text| flag("username", Some(text), name).transpose());
    let pseudonym = flag("pseudonym", own.get_one("pseudonym"), Pseudonym::try_from)?;
    let erasure = Erasure {
        subject,
        usernames: usernames.collect::<Result<_, _>>()?,
        pseudonym: pseudonym.unwrap_or_else(Pseudonym::random),
        dry_run: own.get_flag("dry-run"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let erased = runtime.block_on(erase(&config, &erasure))?;
    if erasure.dry_run {
        println!("would change {erased}; nothing was changed");
    } else {
        println!("changed {erased}; the person is now {}", erasure.pseudonym);
    }
    let others: Vec<&str> = erased.names.iter().map(|name| &**name).collect();
    let unnamed = others.iter().any(|name| !erasure.usernames.iter().any(|known| known == name));
    if unnamed {
        println!(
            "rows of the subject have the names {others:?}: rows of failed logins have a name alone, \
             and are found with --username"
        );
    }
    if erased.spooled {
        println!("rows wait in DATA_DIR/audit: erase again when they are in the database");
    }
    Ok(())
}

/// The value of a flag of a command, if it is there.
fn flag<T>(
    name: &str,
    text: Option<&String>,
    read: impl Fn(String) -> Result<T, &'static str>,
) -> Result<Option<T>, ConfigErrors> {
    let read = |text: &String| {
        read(text.clone()).map_err(|allowed| {
            ConfigErrors::one(format!("--{name}: {text:?} is not allowed; allowed: {allowed}"))
        })
    };
    text.map(read).transpose()
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

fn check_health(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let url = runtime.block_on(healthcheck::ready(&config))?;
    println!("ready: {url}");
    Ok(())
}

fn examine(sources: &Sources, own: &ArgMatches) -> anyhow::Result<ExitCode> {
    let question = question(own)?;
    let config = match sources.config() {
        Ok(config) => config,
        Err(faults) => {
            print!("{}", doctor::misconfigured(&faults));
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let packages = handlers::packages();
    let report = runtime.block_on(doctor::examine(&config, &packages, question.as_ref()));
    print!("{report}");
    Ok(if report.faults() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The token and the package that the doctor is asked about.
fn question(own: &ArgMatches) -> anyhow::Result<Option<Question>> {
    let usage = |fault: &str| Err(ConfigErrors::one(fault).into());
    let get = |name| own.get_one::<String>(name);
    let Some(token) = get("token") else {
        return match get("pkg") {
            Some(_) => usage("--pkg: whether a package may be called depends on --token"),
            None => Ok(None),
        };
    };
    let mut token = token.clone();
    if token == "-" {
        token.clear();
        io::stdin().take(MAX_INPUT).read_to_string(&mut token).context("cannot read the token")?;
    }
    if token.trim().is_empty() {
        return usage("--token: an empty text is not allowed; allowed: a token, or - to read one");
    }
    let package = match get("pkg").map(|id| id.parse()) {
        None => None,
        Some(Ok(id)) => Some(id),
        Some(Err(_)) => {
            return usage("--pkg: allowed: a number; `switchboard packages` lists them");
        }
    };
    Ok(Some(Question { token, package }))
}
