//! The URL of a Postgres database: one server or several, with libpq's parameters.
//!
//! libpq lists servers as `HOST:PORT,HOST:PORT`, or in the parameters `host`, `hostaddr` and `port`. The driver
//! knows one server a URL, so a list becomes a URL for each server.

use std::{borrow::Cow, fmt};

use reqwest::Url;
use sqlx::postgres::PgConnectOptions;

use super::{SETTINGS, value::Secret};

/// The parameters of a URL that the driver knows; it would log the value of any other.
const PARAMETERS: &[&str] = &[
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "statement-cache-capacity",
];

/// The parameters that may list a value for each server.
const LISTS: &[&str] = &["host", "hostaddr", "port"];

/// libpq's parameter for the kind of server that is wanted.
const WANTED: &str = "target_session_attrs";

/// The URL of a Postgres database. It is shown without its password.
#[derive(Debug, Clone)]
pub struct PostgresUrl {
    url: Secret,
    servers: Vec<Secret>,
    shown: String,
}

impl PostgresUrl {
    /// The URL itself, as it was set.
    pub fn expose(&self) -> &str {
        self.url.expose()
    }

    /// A URL for each server, for the driver, in the order of the list.
    pub fn servers(&self) -> impl ExactSizeIterator<Item = &str> {
        self.servers.iter().map(Secret::expose)
    }

    /// Reads a URL. The error says what is wrong with it, without a value that may be secret.
    pub(super) fn read(url: &Secret) -> Result<Self, String> {
        let text = url.expose();
        let servers = servers(text)?.into_iter().map(Secret::from).collect();
        let setting = SETTINGS.iter().find(|setting| setting.name == "DATABASE_URL");
        let shown = setting.map(|setting| setting.shown(text)).unwrap_or_default();
        Ok(Self { url: url.clone(), servers, shown })
    }
}

impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

fn servers(text: &str) -> Result<Vec<String>, String> {
    // The URL may hold a password: only its scheme is shown.
    let scheme = text.split(':').next().unwrap_or_default();
    let refused = || format!("this URL of scheme {scheme:?} is not allowed");
    let is_known =
        ["postgres", "postgresql"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    let rest = text.split_once("://").filter(|_| is_known);
    let (_, rest) = rest.ok_or_else(refused)?;
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    // The last `@`: a password may hold others.
    let places_at = authority.rfind('@').map_or(0, |at| at + 1);
    let (login, places) = authority.split_at(places_at);
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    let parameters = parameters(query).map_err(|reason| match tail.contains('@') {
        // The parameters may be the end of a password.
        true => {
            "its parameters are not known; in a user name or password, write / as %2F, ? as %3F \
                 and # as %23"
                .to_owned()
        }
        false => reason,
    })?;
    let lists = parameters.iter().filter(|(name, _)| LISTS.contains(&name.as_str()));
    let hosts = lists.clone().filter(|(name, _)| name != "port");
    let count = hosts.map(|(_, value)| items(value)).chain([items(places)]).max().unwrap_or(1);
    for (name, value) in lists {
        if items(value) != 1 && items(value) != count {
            return Err(format!("{name} lists {} values for {count} servers", items(value)));
        }
    }
    if items(places) != 1 && items(places) != count {
        return Err(format!("it lists {} hosts, and its parameters {count}", items(places)));
    }
    let mut servers = Vec::new();
    for i in 0..count {
        let place = item(places, i);
        if place.is_empty() && items(places) > 1 {
            return Err("an item of its list of hosts is empty".to_owned());
        }
        let mut server =
            Url::parse(&format!("{scheme}://{login}{place}{path}")).map_err(|_| refused())?;
        for (name, value) in parameters.iter().filter(|(name, _)| name != WANTED) {
            let is_list = LISTS.contains(&name.as_str());
            let value = if is_list { item(value, i) } else { value };
            server.query_pairs_mut().append_pair(name, value);
        }
        if server.as_str().parse::<PgConnectOptions>().is_err() {
            return Err(refused());
        }
        servers.push(server.into());
    }
    Ok(servers)
}

/// The parameters, each of which is known.
fn parameters(query: &str) -> Result<Vec<(String, String)>, String> {
    // Only its query counts.
    let url = Url::parse(&format!("postgres://any?{query}")).map_err(|error| error.to_string())?;
    let mut parameters = Vec::new();
    for (name, value) in url.query_pairs().map(|(n, v)| (Cow::into_owned(n), Cow::into_owned(v))) {
        if name == WANTED && !matches!(value.as_str(), "read-write" | "primary") {
            return Err(format!(
                "{WANTED}={value} is not allowed, since Switchboard changes data: \
                 read-write and primary are, and read-write is the default"
            ));
        }
        if name != WANTED && !PARAMETERS.contains(&&*name) && !name.starts_with("options[") {
            return Err(format!("its parameter {name:?} is not known"));
        }
        parameters.push((name, value));
    }
    Ok(parameters)
}

/// How many items a list has.
fn items(list: &str) -> usize {
    list.split(',').count()
}

/// An item of a list; the only one stands for all.
fn item(list: &str, i: usize) -> &str {
    if items(list) == 1 { list } else { list.split(',').nth(i).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<PostgresUrl, String> {
        PostgresUrl::read(&Secret::from(url.to_owned()))
    }

    /// Host or folder, and port of each server.
    fn places(url: &str) -> Vec<String> {
        let read = read(url).unwrap();
        assert!(!format!("{read:?} {read}").contains("hush-hush"));
        let place = |server: &str| {
            let options: PgConnectOptions = server.parse().unwrap();
            let socket = options.get_socket().map(|folder| folder.display().to_string());
            let host = socket.unwrap_or_else(|| options.get_host().to_owned());
            format!("{host}:{}", options.get_port())
        };
        read.servers().map(place).collect()
    }

    #[test]
    fn a_url_lists_servers_as_libpq_does() {
        for (url, expected) in [
            ("postgres://ann:hush-hush@db.example:5433/x", &["db.example:5433"][..]),
            ("postgres://ann:hush,hush-hush@a:1,b:2/x", &["a:1", "b:2"]),
            ("postgres://ann:hush@hush-hush@a,b:2/x?sslmode=require", &["a:5432", "b:2"]),
            ("PostgreSQL://a:1,b:2", &["a:1", "b:2"]),
            ("postgres:///x?host=a,b&port=1,2&user=ann", &["a:1", "b:2"]),
            ("postgres:///x?host=a%2Cb&port=7", &["a:7", "b:7"]),
            ("postgres:///x?host=/run/a,/run/b&port=1,2", &["/run/a:1", "/run/b:2"]),
            ("postgres://a:1,b:2/x?target_session_attrs=read-write", &["a:1", "b:2"]),
            ("postgres://a:1/x?target_session_attrs=primary", &["a:1"]),
        ] {
            assert_eq!(places(url), expected, "{url}");
        }
    }

    #[test]
    fn login_database_and_parameters_are_those_of_every_server() {
        let url =
            "postgres://ann:hush%20hush@a:1,b:2/x?options=-c%20search_path%3Dy&sslmode=disable";
        for server in read(url).unwrap().servers() {
            let options: PgConnectOptions = server.parse().unwrap();
            assert_eq!(options.get_username(), "ann");
            assert_eq!(options.get_database(), Some("x"));
            assert_eq!(options.get_options(), Some("-c search_path=y"));
            assert!(
                server.contains("hush%20hush") && server.contains("sslmode=disable"),
                "{server}"
            );
        }
    }

    #[test]
    fn a_list_that_has_no_meaning_says_what_is_wrong() {
        for (url, reason) in [
            ("postgres://a,b,c/x?port=1,2", "port lists 2 values for 3 servers"),
            ("postgres://a/x?port=1,2", "port lists 2 values for 1 servers"),
            ("postgres://a,b/x?host=c,d,e", "lists 2 hosts, and its parameters 3"),
            ("postgres://a,,b/x", "is empty"),
            ("postgres:a/x", "is not allowed"),
            ("postgres://ann:hush-hush@a:1,b:port/x", "is not allowed"),
            ("postgres://a,b/x?target_session_attrs=any", "target_session_attrs=any"),
            ("postgres://a,b/x?target_session_attrs=standby", "read-write and primary are"),
            ("postgres://a,b/x?sslpassword=hush-hush", "\"sslpassword\" is not known"),
            ("postgres://ann:why?hush-hush@db/x", "write / as %2F, ? as %3F"),
            ("postgres://ann:x?target_session_attrs=hush-hush@db/x", "write / as %2F, ? as %3F"),
        ] {
            let error = read(url).unwrap_err();
            assert!(error.contains(reason) && !error.contains("hush-hush"), "{url}: {error}");
        }
    }
}
