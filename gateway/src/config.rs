//! The configuration file of warren-gateway.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use warren_proto::endpoint::Endpoint;

use crate::instances::Limits;

/// What warren-gateway is configured with. Each key may be left out.
///
/// ```toml
/// listen = ["0.0.0.0:8080"]
/// control = "http://192.0.2.1:7700"
/// keep_alive_ms = 60000
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Its name, for logs of the control plane.
    pub name: String,
    /// Where calls come in: HTTP/1.1, and HTTP/2 with prior knowledge.
    pub listen: Vec<SocketAddr>,
    /// The control plane.
    pub control: Endpoint,
    /// Directory of its state: the copy of metadata, events, the instances that it started.
    pub state: PathBuf,
    /// Where `GET /metrics` is answered; without it, nowhere.
    pub metrics: Option<SocketAddr>,
    /// Callers are proxies whose `Forwarded` and `X-Forwarded-*` headers are true.
    pub trust_forwarded: bool,
    /// Most connections of callers at one time, at least 1.
    pub connections: usize,
    /// Most calls of a tenant at one time, at least 1.
    pub tenant_calls: u32,
    /// Most calls of a version that wait.
    pub queue: usize,
    /// The longest that a call waits for an instance, in milliseconds.
    pub queue_ms: u64,
    /// How long an idle instance is kept, in milliseconds.
    pub keep_alive_ms: u64,
    /// Most events that are kept at one time.
    pub events: usize,
    /// The longest body of an event, in bytes: at most 64 MiB.
    pub event_bytes: usize,
    /// How long calls have to end when the gateway stops, in milliseconds.
    pub drain_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "gateway".into(),
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 8080))],
            control: Endpoint::Unix("/run/warren/control.sock".into()),
            state: "/var/lib/warren/gateway".into(),
            metrics: None,
            trust_forwarded: false,
            connections: 10_000,
            tenant_calls: 1000,
            queue: 100,
            queue_ms: 10_000,
            keep_alive_ms: 60_000,
            events: 100_000,
            event_bytes: 1 << 20,
            drain_ms: 30_000,
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// File.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML, or a key or its type is unknown.
    #[error("the configuration {path} is wrong: {problem}")]
    Parse {
        /// File.
        path: PathBuf,
        /// Which line and key, and what is wrong there.
        problem: toml::de::Error,
    },
    /// A value is out of its range.
    #[error("{key}: {problem}")]
    Value {
        /// Key.
        key: &'static str,
        /// What is wrong, and what would be right.
        problem: &'static str,
    },
}

impl Config {
    /// Reads the file and checks its values.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|problem| ConfigError::Parse { path: path.into(), problem })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let checks = [
            ("listen", !self.listen.is_empty(), "is empty: name one address, such as 0.0.0.0:8080"),
            ("connections", self.connections > 0, "is 0: write at least 1"),
            ("tenant_calls", self.tenant_calls > 0, "is 0: write at least 1"),
            ("event_bytes", self.event_bytes <= 64 << 20, "is more than 67108864, 64 MiB"),
        ];
        match checks.into_iter().find(|(_, right, _)| !right) {
            Some((key, _, problem)) => Err(ConfigError::Value { key, problem }),
            None => Ok(()),
        }
    }

    /// The limits of instances and calls.
    pub fn limits(&self) -> Limits {
        Limits {
            tenant_calls: self.tenant_calls,
            queue: self.queue,
            wait: Duration::from_millis(self.queue_ms),
            keep_alive: Duration::from_millis(self.keep_alive_ms),
            start_again: Duration::from_millis(50),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gateway.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        assert_eq!(read("").unwrap(), Config::default());
        let config = read("control = \"http://192.0.2.1:7700\"\nqueue = 7").unwrap();
        assert_eq!(config.control.to_string(), "http://192.0.2.1:7700");
        assert_eq!((config.limits().queue, config.limits().wait.as_secs()), (7, 10));
    }

    #[test]
    fn errors_name_file_key_and_remedy() {
        let cases: [(&str, &[&str]); 6] = [
            ("liste = []", &["gateway.toml", "liste", "expected one of"]),
            ("listen = []", &["listen", "0.0.0.0:8080"]),
            ("listen = [\"x\"]", &["gateway.toml", "listen"]),
            ("tenant_calls = 0", &["tenant_calls", "at least 1"]),
            ("connections = 0", &["connections", "at least 1"]),
            ("event_bytes = 99999999", &["event_bytes", "64 MiB"]),
        ];
        for (text, parts) in cases {
            let error = read(text).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{error:?} should contain {part:?}");
            }
        }
        let error = Config::read(Path::new("/nowhere/gateway.toml")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/gateway.toml"), "{error}");
    }
}
