//! The process that forks microVMs.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use super::{ClientError, MicroVm};
use crate::control::{
    MESSAGE_MAX, Tier, ZygoteReply, ZygoteRequest, decode, encode, receive_with_descriptor,
};
use crate::jail::JailConfig;
use crate::make::Make;
use crate::rates::Rates;
use crate::snapshot::Sources;

/// What a zygote is started with.
#[derive(Clone, Debug)]
pub struct ZygoteConfig {
    /// The `warren-vmm` program.
    pub binary: PathBuf,
    /// What microVMs are cloned from: a template that `warren-vmm template` made, and perhaps a diff
    /// that [`MicroVm::snapshot`] made.
    pub sources: Sources,
    /// Directory of the microVMs' sockets; must exist.
    pub run_dir: PathBuf,
    /// How microVMs are confined.
    pub jail: JailConfig,
    /// What their devices may move.
    pub rates: Rates,
    /// A guest that runs for so long without an exit is ended as one that loops for ever; precise to
    /// 20 ms. [`WATCHDOG`](crate::control::WATCHDOG), unless there is a reason.
    pub watchdog: Duration,
}

/// A template's memory, verified and sealed: [`Zygote::memory`].
#[derive(Clone, Debug)]
pub struct TemplateMemory {
    template: [u8; 32],
    memfd: Arc<OwnedFd>,
}

/// A running zygote. When this is dropped the zygote exits; its microVMs live on.
#[derive(Debug)]
pub struct Zygote {
    control: Mutex<AsyncFd<OwnedFd>>,
    child: Child,
    run_dir: PathBuf,
    make: Make,
    memory: TemplateMemory,
}

impl TemplateMemory {
    /// The template's checksum.
    pub fn template(&self) -> [u8; 32] {
        self.template
    }
}

impl Zygote {
    /// Starts a zygote and waits until it has verified and loaded the template.
    ///
    /// # Errors
    /// [`ClientError::Spawn`], or [`ClientError::Zygote`] with what is wrong with the template.
    pub async fn spawn(config: &ZygoteConfig) -> Result<Self, ClientError> {
        Self::spawn_with(config, None).await
    }

    /// [`Zygote::spawn`], with memory that another zygote has filled: if that is of the same template,
    /// it is mapped and not filled once more.
    pub async fn spawn_sharing(
        config: &ZygoteConfig,
        memory: &TemplateMemory,
    ) -> Result<Self, ClientError> {
        Self::spawn_with(config, Some(memory)).await
    }

    async fn spawn_with(
        config: &ZygoteConfig,
        memory: Option<&TemplateMemory>,
    ) -> Result<Self, ClientError> {
        let spawn_error =
            |source: io::Error| ClientError::Spawn { binary: config.binary.clone(), source };
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .map_err(|errno| spawn_error(errno.into()))?;
        // The control socket is the child's standard input: a descriptor that needs no unsafe code
        // between fork and exec to be inherited.
        let Sources { template, diff, disk, key } = &config.sources;
        let mut command = Command::new(&config.binary);
        command.arg("zygote").arg("--template").arg(template);
        for (option, file) in [("--diff", diff), ("--disk", disk), ("--key", key)] {
            if let Some(file) = file {
                command.arg(option).arg(file);
            }
        }
        if memory.is_some() {
            command.arg("--takes-memory");
        }
        for (option, rate) in config.rates.options() {
            if let Some(rate) = rate {
                command.arg(option).arg(rate.to_string());
            }
        }
        let child = command
            .arg("--run-dir")
            .arg(&config.run_dir)
            .args(["--control-fd", "0"])
            .arg("--watchdog-ms")
            .arg(config.watchdog.as_millis().to_string())
            .arg("--first-uid")
            .arg(config.jail.first_uid.to_string())
            .arg("--cgroup")
            .arg(&config.jail.cgroup)
            .arg("--cpu-percent")
            .arg(config.jail.cpu_percent.to_string())
            .stdin(Stdio::from(theirs))
            .spawn()
            .map_err(spawn_error)?;
        // SAFETY: an OwnedFd stays open, and the same, until it is dropped with the AsyncFd.
        let control = unsafe { AsyncFd::register(ours) }.map_err(|e| spawn_error(e.into()))?;
        if let Some(TemplateMemory { template, memfd }) = memory {
            send(&control, &ZygoteRequest::Memory { template: *template }, memfd.as_fd()).await?;
        }
        match receive(&control).await? {
            (ZygoteReply::Loaded { make, template }, Some(memfd)) => {
                let (control, run_dir) = (Mutex::new(control), config.run_dir.clone());
                let memory = TemplateMemory { template, memfd: Arc::new(memfd) };
                Ok(Self { control, child, run_dir, make, memory })
            }
            (ZygoteReply::Failed { error }, _) => Err(ClientError::Zygote(error)),
            _ => Err(ClientError::Malformed),
        }
    }

    /// The zygote's process; `None` once it was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// What its microVMs are of.
    pub fn make(&self) -> Make {
        self.make
    }

    /// Its template's memory, for other zygotes of the same template.
    pub fn memory(&self) -> TemplateMemory {
        self.memory.clone()
    }

    /// Forks a microVM into a slot. It prepares itself up to a tier, and can be released at once.
    ///
    /// The TAP must be what [`ZygoteRequest::Fork`] says.
    ///
    /// # Errors
    /// [`ClientError::Zygote`] if a microVM lives in that slot, or the process cannot be made;
    /// [`ClientError::ZygoteEnded`].
    pub async fn fork(&self, slot: u32, tap: OwnedFd, tier: Tier) -> Result<MicroVm, ClientError> {
        let pid = self.ask(&ZygoteRequest::Fork { slot, tier }, slot, tap).await?;
        MicroVm::open(&self.run_dir, slot, pid).await
    }

    async fn ask(
        &self,
        request: &ZygoteRequest,
        slot: u32,
        tap: OwnedFd,
    ) -> Result<i32, ClientError> {
        let control = self.control.lock().await;
        send(&control, request, tap.as_fd()).await?;
        match receive(&control).await?.0 {
            ZygoteReply::Forked { pid, slot: forked } if forked == slot => Ok(pid),
            ZygoteReply::Failed { error } => Err(ClientError::Zygote(error)),
            _ => Err(ClientError::Malformed),
        }
    }
}

async fn send(
    control: &AsyncFd<OwnedFd>,
    request: &ZygoteRequest,
    descriptor: BorrowedFd<'_>,
) -> Result<(), ClientError> {
    let message = encode(request);
    let sent = control.async_io(Interest::WRITABLE, |socket| {
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&message)],
            &[ControlMessage::ScmRights(&[descriptor.as_raw_fd()])],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(io::Error::from)
    });
    sent.await.map(drop).map_err(|_| ClientError::ZygoteEnded)
}

/// A reply, and the descriptor that came with it.
async fn receive(
    control: &AsyncFd<OwnedFd>,
) -> Result<(ZygoteReply, Option<OwnedFd>), ClientError> {
    let mut buffer = vec![0; MESSAGE_MAX];
    let received = control.async_io(Interest::READABLE, |socket| {
        receive_with_descriptor(socket, &mut buffer, MsgFlags::empty()).map_err(io::Error::from)
    });
    let (length, descriptor) = received.await.map_err(|_| ClientError::ZygoteEnded)?;
    if length == 0 {
        return Err(ClientError::ZygoteEnded);
    }
    let reply = decode(&buffer[..length]).map_err(|_| ClientError::Malformed)?;
    Ok((reply, descriptor))
}
