//! The configuration file of warren-control.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use warren_proto::endpoint::Endpoint;

use crate::functions::publish;
use crate::scaling;

/// What warren-control is configured with. Each key may be left out.
///
/// ```toml
/// listen = ["unix:/run/warren/control.sock", "http://127.0.0.1:7700"]
/// state = "/var/lib/warren/control.db"
/// heartbeat_deadline_ms = 3000
///
/// [functions]
/// repository = "/var/lib/warren/functions"
/// compiler = "/usr/bin/warren-compile"
/// [functions.zones]
/// east = "s3://packages/east"
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where to listen. There is no authentication yet: TCP endpoints belong in a trusted network.
    pub listen: Vec<Endpoint>,
    /// The state's file.
    pub state: PathBuf,
    /// A host or proxy is dead when its heartbeat is this late: 100 to 600000 milliseconds.
    pub heartbeat_deadline_ms: u64,
    /// How proxies are scaled; without it, they are those that were started.
    pub proxies: Option<scaling::Config>,
    /// Where functions are kept, and what compiles them.
    pub functions: publish::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![
                Endpoint::Unix("/run/warren/control.sock".into()),
                Endpoint::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 7700))),
            ],
            state: "/var/lib/warren/control.db".into(),
            heartbeat_deadline_ms: 3000,
            proxies: None,
            functions: publish::Config::default(),
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
        problem: String,
    },
}

impl Config {
    /// Reads the file. Its values are not checked: see [`Self::check`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        toml::from_str(&text).map_err(|problem| ConfigError::Parse { path: path.into(), problem })
    }

    /// Checks the values, wherever they are from.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.listen.is_empty() {
            let problem = "is empty: name one endpoint, such as unix:/run/warren/control.sock";
            return Err(ConfigError::Value { key: "listen", problem: problem.into() });
        }
        if !(100..=600_000).contains(&self.heartbeat_deadline_ms) {
            let problem = format!("{} is not from 100 to 600000", self.heartbeat_deadline_ms);
            return Err(ConfigError::Value { key: "heartbeat_deadline_ms", problem });
        }
        match self.proxies.as_ref().and_then(scaling::Config::problem) {
            Some((key, problem)) => Err(ConfigError::Value { key, problem }),
            None => Ok(()),
        }
    }

    /// [`Self::heartbeat_deadline_ms`].
    pub fn heartbeat_deadline(&self) -> Duration {
        Duration::from_millis(self.heartbeat_deadline_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.toml");
        std::fs::write(&path, text).unwrap();
        let config = Config::read(&path)?;
        config.check()?;
        Ok(config)
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        assert_eq!(read("").unwrap(), Config::default());
        let config = read("listen = [\"http://0.0.0.0:1\"]\nheartbeat_deadline_ms = 100").unwrap();
        assert_eq!(config.listen, ["http://0.0.0.0:1".parse().unwrap()]);
        assert_eq!(config.state, Config::default().state);
        assert_eq!(config.heartbeat_deadline(), Duration::from_millis(100));
        let text = "[functions]\nrepository = \"s3://b/r\"\n[functions.zones]\neast = \"/e\"";
        let functions = read(text).unwrap().functions;
        assert_eq!(functions.repository.as_deref(), Some("s3://b/r"));
        assert_eq!((&functions.zones["east"][..], functions.compiler), ("/e", None));
    }

    #[test]
    fn errors_name_file_key_and_remedy() {
        let cases: [(&str, &[&str]); 9] = [
            ("statte = \"x\"", &["control.toml", "statte", "expected one of", "`state`"]),
            ("state = 3", &["control.toml", "state = 3", "expected path string"]),
            ("listen = [\"tcp:1\"]", &["control.toml", "listen", "\"tcp:1\"", "unix:/PATH"]),
            ("listen = [", &["control.toml", "line 1"]),
            ("listen = []", &["listen", "name one endpoint"]),
            ("[functions]\nregion = \"/r\"", &["region", "expected one of", "`repository`"]),
            (
                "[proxies]\ncommand = [\"/pool\"]\nleast = 2\nmost = 1",
                &["proxies.most", "less than"],
            ),
            ("[proxies]\ncommand = [\"pool\"]\nleast = 2\nmost = 1", &["absolute path"]),
            ("heartbeat_deadline_ms = 10", &["heartbeat_deadline_ms", "10", "100 to 600000"]),
        ];
        for (text, parts) in cases {
            let error = read(text).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{error:?} should contain {part:?}");
            }
        }
        let error = Config::read(Path::new("/nowhere/control.toml")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/control.toml"), "{error}");
    }
}
