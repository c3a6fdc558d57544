//! What can be typed on the command line, as `--help` shows it.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command, value_parser};
use switchboard::{config::SETTINGS, handlers::roles};

/// Every command with its flags; those of settings stand before the command or after it.
pub(crate) fn all() -> Command {
    let file = Arg::new("CONFIG_FILE")
        .long("config-file")
        .value_name("PATH")
        .value_parser(value_parser!(OsString))
        .env("CONFIG_FILE")
        .help("A TOML file of settings, keys in lower case");
    let settings: Vec<_> = SETTINGS
        .iter()
        .map(|setting| {
            let default = if setting.default.is_empty() { "empty" } else { setting.default };
            Arg::new(setting.name)
                .long(setting.flag())
                .value_name(setting.value)
                // Paths may be any bytes; the configuration says what is wrong with other values.
                .value_parser(value_parser!(OsString))
                .allow_hyphen_values(true)
                .help(format!("{} [env: {}] [default: {default}]", setting.help, setting.name))
        })
        .chain([file])
        .collect();
    Command::new("switchboard")
        .about("An actor-based real-time WebSocket server")
        .version(env!("CARGO_PKG_VERSION"))
        .args(&settings)
        .subcommand(
            Command::new("serve").about("Serves until SIGTERM or SIGINT (default)").args(&settings),
        )
        .subcommand(
            Command::new("migrate")
                .about("Brings the schema of the database up to date, and says what it did")
                .args(&settings),
        )
        .subcommand(
            Command::new("audit")
                .about("Works with the audit trail")
                .subcommand_required(true)
                .subcommand(export().args(&settings))
                .subcommand(erase().args(&settings)),
        )
        .subcommand(token().args(&settings))
        .subcommand(doctor().args(&settings))
        .subcommand(
            Command::new("healthcheck")
                .about(
                    "Asks the server of this configuration whether it is ready: exit code 0 or 1",
                )
                .args(&settings),
        )
        .subcommand(Command::new("packages").about("Lists the packages that clients can call"))
        .subcommand(
            Command::new("config")
                .about("Prints the effective configuration and where each value comes from")
                .args(&settings),
        )
}

fn token() -> Command {
    Command::new("token")
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
        )
}

fn export() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).allow_hyphen_values(true);
    let time = "2026-11-22 (in UTC) or 2026-11-22T09:00:00+01:00";
    Command::new("export")
        .about("Writes the audit trail, oldest first, to standard output")
        .arg(flag("since").value_name("TIME").help(format!("From this on: {time}")))
        .arg(flag("until").value_name("TIME").help("Up to this, a whole day included"))
        .arg(flag("format").value_name("FORMAT").default_value("jsonl").help("csv or jsonl"))
        .arg(
            flag("output")
                .value_name("FILE")
                .value_parser(value_parser!(OsString))
                .help("Write to this file, which is replaced"),
        )
}

fn erase() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).allow_hyphen_values(true);
    Command::new("erase")
        .about(
            "Takes a person out of the audit trail: a random pseudonym stands there from then on",
        )
        .arg(flag("subject").value_name("SUB").required(true).help("The person's sub (user_id)"))
        .arg(
            flag("username").value_name("NAME").action(ArgAction::Append).help(
                "A name of the person, for rows without a user_id; may be given several times",
            ),
        )
        .arg(
            flag("pseudonym")
                .value_name("PSEUDONYM")
                .help("Go on with the pseudonym of an earlier run [default: a new one]"),
        )
        .arg(
            Arg::new("dry-run")
                .long("dry-run")
                .action(ArgAction::SetTrue)
                .help("Say how many rows would be changed, and change none"),
        )
        .arg(
            Arg::new("vacuum")
                .long("vacuum")
                .action(ArgAction::SetTrue)
                .help("SQLite: take the bytes of old rows out of its files too, which stops others from writing"),
        )
}

fn doctor() -> Command {
    Command::new("doctor")
        .about("Checks what serve needs, and says what is wrong with a token")
        .arg(
            Arg::new("token").long("token").value_name("TOKEN").allow_hyphen_values(true).help(
                "A token to be explained; -: read it, so that it stands in no list of processes",
            ),
        )
        .arg(
            Arg::new("pkg")
                .long("pkg")
                .value_name("PKG_ID")
                .allow_hyphen_values(true)
                .help("With --token: whether it may call this package"),
        )
}
