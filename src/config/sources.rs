//! Where the texts of settings come from. Flags win over the environment, which wins over the TOML file.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    io,
    path::Path,
};

use super::{Config, ConfigErrors, Environment, LogFormat, SETTINGS, value::Value};

/// Where the value of a setting came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A flag of the command.
    Flag,
    /// The environment.
    Environment,
    /// The TOML file.
    File,
    /// Nothing set it.
    Default,
}

/// The texts of the settings from every source. Only paths need not be UTF-8.
#[derive(Debug, Default)]
pub struct Sources {
    flags: HashMap<String, OsString>,
    environment: HashMap<String, OsString>,
    file: HashMap<String, OsString>,
    faults: Vec<String>,
}

impl Sources {
    /// Takes flags by setting name, the environment, and the path of a TOML file. `read` reads that file,
    /// and those that hold secrets: `DATABASE_URL_FILE` names one with the text of `DATABASE_URL`.
    pub fn new(
        flags: HashMap<String, OsString>,
        environment: impl Iterator<Item = (String, OsString)>,
        file: Option<&Path>,
        read: impl Fn(&Path) -> io::Result<String>,
    ) -> Self {
        let mut variables: HashMap<_, _> = environment.collect();
        let mut sources = Self { flags, ..Self::default() };
        for setting in SETTINGS {
            let text = variables.remove(setting.name);
            let held = setting.file_variable().and_then(|name| {
                let path = variables.remove(&name).filter(|path| !path.is_empty())?;
                Some((name, path))
            });
            let text = match held {
                Some((name, path)) => sources.read_secret(&name, Path::new(&path), text, &read),
                None => text,
            };
            sources.environment.extend(text.map(|text| (setting.name.to_owned(), text)));
        }
        match file.map(|name| (name, read(name))) {
            Some((name, Ok(text))) => sources.read_file(name, &text),
            Some((name, Err(error))) => {
                sources.faults.push(format!("CONFIG_FILE: {}: {error}", name.display()));
            }
            None => {}
        }
        sources
    }

    /// The text in the file that a variable names. An empty one is a secret that was never written: taken
    /// for no value, it would have the server run on a default.
    fn read_secret(
        &mut self,
        variable: &str,
        path: &Path,
        direct: Option<OsString>,
        read: &impl Fn(&Path) -> io::Result<String>,
    ) -> Option<OsString> {
        let shown = path.display();
        let fault = match read(path) {
            _ if direct.is_some_and(|text| !text.is_empty()) => {
                let setting = variable.trim_end_matches("_FILE");
                format!("{variable}: it is not allowed beside {setting}; allowed: one of the two")
            }
            Ok(text) if text.trim().is_empty() => format!("{variable}: {shown} is empty"),
            Ok(text) => return Some(text.trim().into()),
            Err(error) => format!("{variable}: {shown}: {error}"),
        };
        self.faults.push(fault);
        None
    }

    /// The configuration, or the faults of the file and of all settings at once.
    pub fn config(&self) -> Result<Config, ConfigErrors> {
        let config = Config::read_bytes(|name| self.get(name).map(|(text, _)| text.to_owned()));
        if self.faults.is_empty() {
            return config;
        }
        let settings = config.err().map(|faults| faults.0).unwrap_or_default();
        Err(ConfigErrors([self.faults.clone(), settings].concat()))
    }

    /// The text of a setting and where it came from; none where only the default is left.
    pub fn get(&self, name: &str) -> Option<(&OsStr, Source)> {
        [
            (&self.flags, Source::Flag),
            (&self.environment, Source::Environment),
            (&self.file, Source::File),
        ]
        .into_iter()
        .find_map(|(texts, source)| Some((&**texts.get(name)?, source)))
    }

    /// `LOG_FORMAT`, also where the rest of the configuration has faults.
    pub fn log_format(&self) -> LogFormat {
        self.readable("LOG_FORMAT").unwrap_or(LogFormat::Auto)
    }

    /// `ENV`, also where the rest of the configuration has faults.
    pub fn environment(&self) -> Environment {
        self.readable("ENV").unwrap_or(Environment::Dev)
    }

    fn readable<T: Value>(&self, name: &str) -> Option<T> {
        T::read_bytes(self.get(name)?.0)
    }

    fn read_file(&mut self, name: &Path, text: &str) {
        let name = name.display();
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(error) => return self.faults.push(format!("{name}: {error}")),
        };
        for (key, value) in table {
            let Some(setting) = SETTINGS.iter().find(|setting| setting.key() == key) else {
                self.faults.push(format!(
                    "{name}: {key:?} is not a setting; `switchboard config` lists them"
                ));
                continue;
            };
            match file_text(value) {
                Some(text) => drop(self.file.insert(setting.name.to_owned(), text.into())),
                None => self.faults.push(format!(
                    "{name}: {key} must be a string, a number, a boolean or a list of strings"
                )),
            }
        }
    }
}

fn file_text(value: toml::Value) -> Option<String> {
    Some(match value {
        toml::Value::String(text) => text,
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(value) => value.to_string(),
        toml::Value::Array(items) => {
            items.into_iter().map(file_text).collect::<Option<Vec<_>>>()?.join(",")
        }
        _ => return None,
    })
}
