//! What can go wrong, in sentences, with a hint and an exit code for each.

use tonic::{Code, Status};
use warren_proto::endpoint::{ConnectError, Endpoint};

/// The exit codes, for `--help`.
pub const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage or value, \
    3 control plane or host not reachable, 4 not found, 5 no capacity, 6 the probe failed.";

/// Why a command did not do all of what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection to the control plane.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The control plane's answer.
    #[error("{}", status.message())]
    Refused { endpoint: Endpoint, status: Status },
    /// An argument that only turns out to be wrong with others.
    #[error("{0}")]
    Usage(String),
    /// No id begins like this.
    #[error("there is no instance whose id begins with \"{0}\"")]
    NoInstance(String),
    /// Several ids begin like this.
    #[error("{} instances have ids that begin with \"{prefix}\": {}", ids.len(), ids.join(", "))]
    Ambiguous { prefix: String, ids: Vec<String> },
    /// The answer cannot be used.
    #[error("the control plane's answer lacks {0}")]
    Incomplete(&'static str),
    /// Proxies still own addresses.
    #[error("these proxies still own VPCs' addresses: {}", names.join(", "))]
    Undrained { names: Vec<String> },
    /// A host or proxy does not tell what it dropped.
    #[error("the drops of {host} are not known: {problem}")]
    DropsUnknown { host: String, problem: String },
    /// A host does not tell of its flows.
    #[error("the flows of {host} are not known: {problem}")]
    FlowsUnknown { host: String, problem: String },
    /// A host does not tell what snapshots it keeps.
    #[error("the snapshots of {host} are not known: {problem}")]
    SnapshotsUnknown { host: String, problem: String },
    /// A host does not tell how often its rules decided.
    #[error("the counters of {host} are not known: {problem}")]
    HitsUnknown { host: String, problem: String },
    /// No such security group.
    #[error("VPC \"{vpc}\" has no security group \"{name}\"")]
    NoGroup { vpc: String, name: String },
    /// The instance does not run the probe.
    #[error("the instance's answer is not a probe's")]
    NotAProbe,
    /// The probe's own error.
    #[error("the probe failed: {0}")]
    Probe(String),
    /// Some of several failed, the first one for this reason.
    #[error("{failed} of {all} failed, the first because {first}")]
    Some { failed: usize, all: usize, first: Box<Error> },
    /// Standard output is gone.
    #[error("cannot write the result: {0}")]
    Output(#[from] std::io::Error),
}

impl Error {
    /// What to do about it, where the error itself does not say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Connect(ConnectError::NotPermitted(_)) => None,
            Self::Connect(_) => Some(
                "start warren-control, or name its endpoint with --endpoint or WARREN_ENDPOINT"
                    .into(),
            ),
            Self::Refused { endpoint, status } if status.code() == Code::Unimplemented => {
                Some(format!("is {endpoint} the endpoint of a control plane of this version?"))
            }
            Self::NoInstance(_) => Some("`warren vm ls` lists them".into()),
            Self::Ambiguous { .. } => Some("write more of the id".into()),
            Self::Incomplete(_) | Self::NotAProbe => {
                Some("are warren, warren-control and warrend of the same version?".into())
            }
            Self::NoGroup { vpc, .. } => {
                Some(format!("`warren security-group ls {vpc}` lists them"))
            }
            Self::Undrained { .. } => {
                Some("`warren host ls` shows whether another proxy is alive and not drained".into())
            }
            Self::Some { first, .. } => first.hint(),
            Self::Refused { .. }
            | Self::Usage(_)
            | Self::DropsUnknown { .. }
            | Self::FlowsUnknown { .. }
            | Self::SnapshotsUnknown { .. }
            | Self::HitsUnknown { .. }
            | Self::Probe(_)
            | Self::Output(_) => None,
        }
    }

    /// See [`EXIT_CODES`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Incomplete(_) | Self::NotAProbe | Self::Output(_) => 1,
            Self::Usage(_) | Self::Ambiguous { .. } => 2,
            Self::Connect(_)
            | Self::Undrained { .. }
            | Self::DropsUnknown { .. }
            | Self::FlowsUnknown { .. }
            | Self::SnapshotsUnknown { .. }
            | Self::HitsUnknown { .. } => 3,
            Self::NoInstance(_) | Self::NoGroup { .. } => 4,
            Self::Probe(_) => 6,
            Self::Some { first, .. } => first.exit_code(),
            Self::Refused { status, .. } => match status.code() {
                Code::InvalidArgument => 2,
                Code::Unavailable | Code::DeadlineExceeded => 3,
                Code::NotFound => 4,
                Code::ResourceExhausted => 5,
                _ => 1,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_is_one_sentence_with_a_code() {
        let endpoint: Endpoint = "unix:/run/warren/control.sock".parse().unwrap();
        let nobody = Error::from(ConnectError::NothingListens(endpoint.clone()));
        assert!(nobody.to_string().contains("unix:/run/warren/control.sock"), "{nobody}");
        assert!(nobody.hint().unwrap().contains("WARREN_ENDPOINT"));
        assert_eq!(nobody.exit_code(), 3);

        let status = Status::resource_exhausted("host h1 has no free slot");
        let full = Error::Refused { endpoint, status };
        assert_eq!(full.to_string(), "host h1 has no free slot");
        assert_eq!(full.exit_code(), 5);

        let some = Error::Some { failed: 2, all: 5, first: Box::new(full) };
        assert_eq!(some.to_string(), "2 of 5 failed, the first because host h1 has no free slot");
        assert_eq!(some.exit_code(), 5);

        let ids = vec!["3a1".to_owned(), "3a2".to_owned()];
        let two = Error::Ambiguous { prefix: "3a".into(), ids };
        assert_eq!(two.to_string(), "2 instances have ids that begin with \"3a\": 3a1, 3a2");
    }
}
