//! Drives `warren-vmm` from tokio: what `warrend` uses.
//!
//! ```no_run
//! # async fn example(tap: std::os::fd::OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
//! use std::path::PathBuf;
//! use std::time::Duration;
//! use warren_vmm::client::{self, Zygote, ZygoteConfig};
//! use warren_vmm::control::{PublicIdentity, ReleaseRequest, Tier, WATCHDOG};
//! use warren_vmm::jail::JailConfig;
//! use warren_vmm::rates::Rates;
//!
//! let config = ZygoteConfig {
//!     binary: "/usr/bin/warren-vmm".into(),
//!     sources: PathBuf::from("/var/lib/warren/probe.template").into(),
//!     run_dir: "/run/warren/vm".into(),
//!     jail: JailConfig::named("example"),
//!     rates: Rates::default(),
//!     watchdog: WATCHDOG,
//! };
//! let zygote = Zygote::spawn(&config).await?;
//! let mut microvm = zygote.fork(1, tap, Tier::Parked).await?;
//! let request = ReleaseRequest { identity: PublicIdentity::default(), tag: vec![] };
//! microvm.release(&request).await?;
//! let reply = client::invoke(microvm.path(), b"request", Duration::from_secs(1)).await?;
//! microvm.stop().await?;
//! # Ok(()) }
//! ```

mod invocation;
mod microvm;
mod zygote;

use std::io;
use std::path::PathBuf;

pub use invocation::{Invocation, invoke};
pub use microvm::{MicroVm, discover};
pub use zygote::{TemplateMemory, Zygote, ZygoteConfig};

use crate::control::{EndReason, Refusal};
use crate::snapshot::SnapshotError;

/// Why a microVM or the zygote did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The program could not be started.
    #[error("cannot start {}: {source}", binary.display())]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The zygote refused, for the reason it gave.
    #[error("zygote: {0}")]
    Zygote(String),
    /// The zygote is not there any more.
    #[error("the zygote ended: see its log, then start another one")]
    ZygoteEnded,
    /// No microVM listens there.
    #[error("no microVM at {}: {source}", path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Reading or writing a socket failed.
    #[error("connection to the microVM failed: {0}")]
    Io(#[from] io::Error),
    /// The other side speaks another version.
    #[error("the microVM answered what this version does not know: is warren-vmm of this release?")]
    Malformed,
    /// The microVM refused; nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The microVM ended before it answered.
    #[error("the microVM ended: {0}")]
    Ended(EndReason),
    /// The guest took no call, or closed the connection in the middle of one.
    #[error("the guest closed the invocation channel: it serves no such port, or has ended")]
    ChannelClosed,
    /// An invocation or its reply is longer than [`warren_abi::microvm::INVOCATION_MAX`].
    #[error("invocation or reply of {0} bytes is longer than 1 MiB")]
    TooLong(u64),
    /// A snapshot came and cannot be kept.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(std::time::Duration),
}
