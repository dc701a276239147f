//! A microVM, seen over its control connection.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

use super::ClientError;
use crate::control::{
    CONTROL_LINE, EndReason, ReleaseRequest, Reply, Request, Status, Tier, Timeline, encode_frame,
    socket_path, socket_slot, take_frame,
};
use crate::make::Make;
use crate::snapshot::diff;

/// How long [`discover`] waits for a microVM to say who it is. One that is well does so within 20 ms,
/// even while its guest computes; this is for hosts that are busy.
const DISCOVER_TIMEOUT: Duration = Duration::from_secs(5);

/// A control connection to a microVM. Several may exist at a time, also from several processes.
///
/// Dropping it leaves the microVM as it is. Only [`MicroVm::ended`] may be cancelled (dropped
/// before it is done) and the connection used further.
#[derive(Debug)]
pub struct MicroVm {
    slot: u32,
    pid: i32,
    path: PathBuf,
    stream: UnixStream,
    received: Vec<u8>,
}

impl MicroVm {
    /// Connects to the microVM in a slot, and asks how far it is, and who.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if there is none; [`ClientError::Ended`] if it could not be made.
    pub async fn connect(run_dir: &Path, slot: u32) -> Result<(Self, Status), ClientError> {
        let mut microvm = Self::open(run_dir, slot, 0).await?;
        let status = microvm.status().await?;
        microvm.pid = status.pid;
        Ok((microvm, status))
    }

    /// Connects to the microVM in a slot, whose process is known.
    pub(super) async fn open(run_dir: &Path, slot: u32, pid: i32) -> Result<Self, ClientError> {
        let path = socket_path(run_dir, slot);
        let mut stream = UnixStream::connect(&path)
            .await
            .map_err(|source| ClientError::Connect { path: path.clone(), source })?;
        let greeted = stream.write_all(CONTROL_LINE).await;
        greeted.map_err(|_| ClientError::Ended(EndReason::Lost))?;
        Ok(Self { slot, pid, path, stream, received: Vec::new() })
    }

    /// The slot it was forked into.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its socket, for [`super::invoke`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks how far it is, and who.
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        self.ask_status(&Request::Status).await
    }

    /// Asks what it is of: the same as its zygote's [`super::Zygote::make`].
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it is of a version that does not say.
    pub async fn make(&mut self) -> Result<Make, ClientError> {
        match self.ask(&Request::Make).await? {
            Reply::Make(make) => Ok(make),
            other => Err(unexpected(other)),
        }
    }

    /// Has it prepare itself so far, unless it is beyond, and waits until it is.
    pub async fn advance(&mut self, tier: Tier) -> Result<Status, ClientError> {
        self.ask_status(&Request::Advance(tier)).await
    }

    async fn ask_status(&mut self, request: &Request) -> Result<Status, ClientError> {
        match self.ask(request).await? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    /// Gives it its identity and lets it run; returns when the guest has acknowledged.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it was released before or the identity is out of range.
    pub async fn release(&mut self, request: &ReleaseRequest) -> Result<Timeline, ClientError> {
        match self.ask(&Request::Release(request.clone())).await? {
            Reply::Ready(timeline) => Ok(timeline),
            other => Err(unexpected(other)),
        }
    }

    /// Makes it again what it was at its barrier, to be released anew: for the same tenant's same
    /// function only.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it was not released.
    pub async fn recycle(&mut self) -> Result<Status, ClientError> {
        self.ask_status(&Request::Recycle).await
    }

    /// Saves it as it is when its guest waits next, as a [diff](crate::snapshot::diff) against its
    /// template; it goes on, and notices nothing but the time that passes. The file is there whole or
    /// not at all, encrypted if a key file is named. Returns its length, in bytes.
    ///
    /// The client writes it and not the microVM, which has no files and no key.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it was not released; [`ClientError::Snapshot`].
    pub async fn snapshot(&mut self, path: &Path, key: Option<&Path>) -> Result<u64, ClientError> {
        let bytes = match self.ask(&Request::Snapshot).await? {
            Reply::Snapshot { bytes } if bytes <= diff::BYTES_MAX => bytes as usize,
            other => return Err(unexpected(other)),
        };
        let mut content = std::mem::take(&mut self.received);
        self.received = content.split_off(bytes.min(content.len()));
        content.reserve_exact(bytes - content.len());
        while content.len() < bytes {
            let left = bytes - content.len();
            if (&mut self.stream).take(left as u64).read_buf(&mut content).await? == 0 {
                return Err(ClientError::Ended(EndReason::Lost));
            }
        }
        let (path, key) = (path.to_owned(), key.map(Path::to_owned));
        let kept = spawn_blocking(move || diff::keep(&path, content, key.as_deref())).await;
        Ok(kept.map_err(io::Error::from)??)
    }

    /// Ends it; returns why it ended, which is [`EndReason::Stopped`] unless it was faster.
    pub async fn stop(&mut self) -> Result<EndReason, ClientError> {
        match self.ask(&Request::Stop).await {
            Ok(other) => Err(unexpected(other)),
            Err(ClientError::Ended(reason)) => Ok(reason),
            Err(error) => Err(error),
        }
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> EndReason {
        loop {
            match self.reply().await {
                Err(ClientError::Ended(reason)) => return reason,
                Err(_) => return EndReason::Lost,
                Ok(_) => {}
            }
        }
    }

    async fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        // A microVM that ended may have left its reason for us to read.
        let written = self.stream.write_all(&encode_frame(request)).await;
        match self.reply().await {
            Err(ClientError::Ended(EndReason::Lost)) => {
                written?;
                Err(ClientError::Ended(EndReason::Lost))
            }
            other => other,
        }
    }

    /// The next message. Whatever was read stays in `received` if this future is dropped.
    async fn reply(&mut self) -> Result<Reply, ClientError> {
        loop {
            match take_frame(&mut self.received).map_err(|_| ClientError::Malformed)? {
                Some(Reply::Ended(reason)) => return Err(ClientError::Ended(reason)),
                Some(Reply::Refused(refusal)) => return Err(refusal.into()),
                Some(reply) => return Ok(reply),
                None => {}
            }
            match self.stream.read_buf(&mut self.received).await {
                Ok(0) => return Err(ClientError::Ended(EndReason::Lost)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ClientError::Ended(EndReason::Lost));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn unexpected(_: Reply) -> ClientError {
    ClientError::Malformed
}

/// Finds the microVMs that live in a directory, such as after a restart of `warrend`, with their
/// state, in the order of their slots. Sockets that nobody listens on any more are removed. One that
/// does not answer within five seconds is reported in the log, and is not among them.
///
/// # Errors
/// [`ClientError::Io`] if the directory cannot be read.
pub async fn discover(run_dir: &Path) -> Result<Vec<(MicroVm, Status)>, ClientError> {
    // At once: several that do not answer are waited for together.
    let mut asked = JoinSet::new();
    let mut entries = tokio::fs::read_dir(run_dir).await?;
    while let Some(entry) = entries.next_entry().await? {
        let Some(slot) = socket_slot(&entry.path()) else { continue };
        let run_dir = run_dir.to_owned();
        asked.spawn(async move {
            let answer = timeout(DISCOVER_TIMEOUT, MicroVm::connect(&run_dir, slot)).await;
            (entry.path(), slot, answer)
        });
    }
    let mut found = Vec::new();
    for (path, slot, answer) in asked.join_all().await {
        match answer {
            Ok(Ok(microvm)) => found.push(microvm),
            Ok(Err(ClientError::Connect { source, .. }))
                if source.kind() == io::ErrorKind::ConnectionRefused =>
            {
                tokio::fs::remove_file(&path).await?;
            }
            Ok(Err(error)) => {
                tracing::warn!(slot, %error, "a microVM was found but cannot be used");
            }
            Err(_) => tracing::warn!(slot, "a microVM was found but does not answer"),
        }
    }
    found.sort_by_key(|(microvm, _)| microvm.slot);
    Ok(found)
}
