//! How to log where the rest of a configuration has faults.

use super::{Environment, LogFormat, Sources, value::Value};

impl Sources {
    /// `LOG_FORMAT`, as far as it can be read.
    pub fn log_format(&self) -> LogFormat {
        self.readable("LOG_FORMAT").unwrap_or(LogFormat::Auto)
    }

    /// `ENV`, as far as it can be read.
    pub fn environment(&self) -> Environment {
        self.readable("ENV").unwrap_or(Environment::Dev)
    }

    fn readable<T: Value>(&self, name: &str) -> Option<T> {
        T::read(self.get(name)?.0)
    }
}
