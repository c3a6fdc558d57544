//! The command line: `serve`, `migrate`, `audit export`, `audit erase`, `token`, `packages`, `config`, `doctor`,
//! `healthcheck`. Everything else is the library's.

#![warn(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "`print` alone writes to standard output"
)]

mod commands;
mod failure;
mod print;
mod signals;

use std::{
    collections::HashMap,
    ffi::OsString,
    fmt::Write as _,
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
    config::{Config, ConfigErrors, SETTINGS, Source, Sources, Weakness},
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
/// Time for threads that wait for a disk or a name server when a server has stopped.
const LAST_THREADS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let matches = commands::all().try_get_matches();
    let done = match &matches {
        Ok(matches) => dispatch(matches),
        Err(usage) if usage.use_stderr() => usage.exit(),
        Err(said) => print::help(said).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        let serve = matches.ok().as_ref().and_then(settings_of_server);
        complain(failure::lines(&error, serve.as_ref()));
        let config = error.is::<ConfigErrors>();
        ExitCode::from(if config { EXIT_CONFIG } else { 1 })
    })
}

/// Where the command is `serve`, or none.
fn settings_of_server(matches: &ArgMatches) -> Option<Sources> {
    match matches.subcommand() {
        None => Some(sources(&[matches])),
        Some(("serve", own)) => Some(sources(&[matches, own])),
        Some(_) => None,
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
    let get = |name: &str| levels.iter().rev().find_map(|level| level.get_one::<OsString>(name));
    let flags: HashMap<_, _> = SETTINGS
        .iter()
        .filter_map(|setting| Some((setting.name.to_owned(), get(setting.name)?.clone())))
        .collect();
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let file = get("CONFIG_FILE").map(Path::new);
    Sources::new(flags, environment, file, |path| fs::read_to_string(path))
}

fn serve(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    // Dropped after the runtime: what its end logs is written too.
    let _last_lines = telemetry::install(&config.log, config.environment)
        .context("cannot start the thread of the log")?;
    for weakness in config.weaknesses() {
        let Weakness { setting, says, fix } = weakness;
        tracing::warn!(setting, fix, "weak in production: {says}");
    }
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
    let served = runtime.block_on(async { tokio::spawn(serve_until_signal(config)).await? });
    // A start that was stopped may have left a thread at a disk that does not answer.
    runtime.shutdown_timeout(LAST_THREADS);
    served
}

async fn serve_until_signal(config: Config) -> anyhow::Result<()> {
    let signals = Signals::listen()?;
    let listeners = Listeners::bind(&config.server).await.context("cannot listen")?;
    server::run(config, handlers::packages(), listeners, signals.stop()).await?;
    Ok(())
}

fn migrate_database(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let migrated = runtime.block_on(migrate::migrate(&config, &|progress| tell(progress)))?;
    let Migrated { schema, names } = migrated;
    let mut done = Vec::new();
    if !schema.is_old() && names == 0 {
        let (has, needs) = (schema.has(), schema.needs());
        done.push(format!(
            "nothing to do: the schema versions are {has}, this program needs {needs}"
        ));
    }
    for Part { history, pending, .. } in schema.0 {
        done.extend(pending.iter().map(|version| format!("{history} migration {version} was run")));
    }
    if names > 0 {
        done.push(format!("{names} names of authors were folded anew for searches"));
    }
    print::line(done.join("\n"))
}

/// Says how far a long migration is, every five seconds.
fn tell(progress: Progress) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_some_and(|last| last.elapsed() < Duration::from_secs(5)) {
        return;
    }
    *last = Some(Instant::now());
    let text = match progress {
        Progress::Left(rows) => {
            format!("rows of the audit trail that get their integer id: {rows} left")
        }
        Progress::Indexes => "the audit trail gets its new indexes".to_owned(),
        Progress::Held => {
            "waiting for another process that has locked the folder of the database".to_owned()
        }
        Progress::Locked => {
            "waiting for a lock: other sessions use the table user_actions".to_owned()
        }
    };
    // The migration goes on, whether or not somebody hears of it.
    let _ = print::line(text);
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
    let file = own.get_one::<OsString>("output").map(Path::new);
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
        vacuum: own.get_flag("vacuum"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if !erasure.dry_run {
        // Now: whatever ends it in the middle, this is what goes on with it.
        complain(format!(
            "the person is called {0} from now on; if this is interrupted, run it again with --pseudonym {0}",
            erasure.pseudonym
        ));
    }
    let erased = runtime.block_on(erase(&config, &erasure))?;
    let mut done = vec![match erasure.dry_run {
        true => format!("would change {erased}; nothing was changed"),
        false => format!("changed {erased}; the person is now {}", erasure.pseudonym),
    }];
    let others: Vec<&str> = erased.names.iter().map(|name| &**name).collect();
    let unnamed = others.iter().any(|name| !erasure.usernames.iter().any(|known| known == name));
    if unnamed {
        done.push(format!(
            "rows of the subject have the names {others:?}: rows of failed logins have a name alone, \
             and are found with --username"
        ));
    }
    if erased.spooled {
        done.push(format!(
            "rows wait in DATA_DIR/audit: when they are in the database, erase again with --pseudonym {}",
            erasure.pseudonym
        ));
    }
    print::line(done.join("\n"))?;
    anyhow::ensure!(
        erased.left_out == 0,
        "{} rows cannot be read, and may still have the person in them: look at them by hand",
        erased.left_out
    );
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
    let named = |text: String| match text.trim().is_empty() || text.contains(char::is_control) {
        true => Err("a name that is not empty, without control characters"),
        false => Ok(text),
    };
    let user = flag("user", own.get_one("user"), named)?.context("--user is required")?;
    let roles: Vec<&str> = match own.get_many::<String>("roles") {
        Some(roles) => roles.map(|role| role.trim()).filter(|role| !role.is_empty()).collect(),
        None => roles::ALL.to_vec(),
    };
    let lasting = |text: String| match switchboard::config::duration(&text)? {
        ttl if ttl < Duration::from_secs(1) => Err("at least 1s"),
        ttl => Ok(ttl),
    };
    let ttl = flag("ttl", own.get_one("ttl"), lasting)?.context("--ttl has a default")?;
    let issuer = issuer(&config)?;
    print::line(issuer.token(&user, &roles, ttl))?;
    complain(key_told(&issuer, &config.auth.dev_key_file));
    Ok(())
}

/// Whose tokens these are: a server trusts the key in one file alone, by default one of its own folder.
fn key_told(issuer: &DevIssuer, file: &Path) -> String {
    let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let file = file.display();
    match issuer.is_new() {
        true => format!(
            "made a new development key, {file}: only a server with this file accepts the token; \
             run this in the server's folder, or with its DATA_DIR or DEV_KEY_FILE"
        ),
        false => format!("signed with the development key {file}"),
    }
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
        format!("{id:>6}  {name:<22} {roles:<14} {input:<52} {output}\n")
    };
    let mut table = row("pkg_id", "name", "roles", "input", "output");
    for package in handlers::packages() {
        let roles = if package.roles.is_empty() { "-".to_owned() } else { package.roles.join(",") };
        let id = package.id.to_string();
        table += &row(&id, package.name, &roles, package.input, package.output);
    }
    print::print(&table)
}

fn print_config(sources: &Sources) -> anyhow::Result<()> {
    let mut table = String::new();
    for setting in SETTINGS {
        let default = (setting.default.as_ref(), Source::Default);
        let (text, source) = sources.get(setting.name).unwrap_or(default);
        let text = setting.shown(&text.to_string_lossy());
        let source = match source {
            Source::Flag => "flag",
            Source::Environment => "environment",
            Source::File => "file",
            Source::Default => "default",
        };
        writeln!(table, "{} = {text:?} # {source}", setting.key())?;
    }
    print::print(&table)?;
    sources.config()?;
    Ok(())
}

fn check_health(sources: &Sources) -> anyhow::Result<()> {
    let config = sources.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let url = runtime.block_on(healthcheck::ready(&config))?;
    print::line(format!("ready: {url}"))
}

fn examine(sources: &Sources, own: &ArgMatches) -> anyhow::Result<ExitCode> {
    let question = question(own)?;
    let config = match sources.config() {
        Ok(config) => config,
        Err(faults) => {
            print::print(&doctor::misconfigured(&faults).to_string())?;
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let packages = handlers::packages();
    let report = runtime.block_on(doctor::examine(&config, &packages, question.as_ref()));
    print::print(&report.to_string())?;
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
