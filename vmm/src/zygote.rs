//! The zygote: a single-threaded process that holds the verified template and forks microVMs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};

use crate::control::{
    EndReason, MESSAGE_MAX, ZygoteReply, ZygoteRequest, decode, encode, socket_path,
};
use crate::instance;
use crate::machine::{Machine, MachineState};
use crate::snapshot::Template;
use crate::template::{self, TemplateError};

/// Why a zygote cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// The template or KVM cannot be used. The client was told.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> ZygoteError {
    move |error| ZygoteError::System { what, source: error.into() }
}

/// How a zygote's process ends: as itself, or as one of the microVMs it forked.
#[derive(Debug)]
pub enum Ended {
    /// The control socket was closed.
    Zygote,
    /// This process became a microVM, and that ended.
    MicroVm(EndReason),
}

struct Zygote {
    control: OwnedFd,
    children: SignalFd,
    run_dir: PathBuf,
    /// How long a guest may run without an exit.
    watchdog: Duration,
    kvm: Kvm,
    cpuid: CpuId,
    memory: Arc<File>,
    memory_bytes: u64,
    state: MachineState,
    /// Slots of the processes that live.
    slots: HashMap<Pid, u32>,
}

/// Loads the template and serves the control socket until it is closed.
///
/// # Errors
/// The template cannot be used, which the client is told as well; or the host fails.
pub fn run(
    template: &Path,
    run_dir: &Path,
    watchdog: Duration,
    control: OwnedFd,
) -> Result<Ended, ZygoteError> {
    let (kvm, cpuid, template) = match load(template) {
        Ok(loaded) => loaded,
        Err(error) => {
            let _ = reply(&control, &ZygoteReply::Failed { error: error.to_string() });
            return Err(error.into());
        }
    };
    // Blocked in the zygote and read from a descriptor; unblocked again in each microVM.
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&child), None).map_err(system("sigprocmask"))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let children = SignalFd::with_flags(&child, flags).map_err(system("signalfd"))?;
    let memory_bytes = template.memory_bytes;
    reply(&control, &ZygoteReply::Loaded { memory_bytes }).map_err(system("control socket"))?;
    let zygote = Zygote {
        control,
        children,
        run_dir: run_dir.to_owned(),
        watchdog,
        kvm,
        cpuid,
        memory: Arc::new(template.memory),
        memory_bytes,
        state: template.header.machine,
        slots: HashMap::new(),
    };
    zygote.serve()
}

fn load(path: &Path) -> Result<(Kvm, CpuId, Template), TemplateError> {
    let (kvm, cpuid) = template::open_kvm()?;
    let template = template::load(path)?;
    Ok((kvm, cpuid, template))
}

impl Zygote {
    fn serve(mut self) -> Result<Ended, ZygoteError> {
        loop {
            let mut fds = [
                PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(system("poll")(errno)),
            }
            let ready = |fd: &PollFd| fd.any().unwrap_or(true);
            let (asked, died) = (ready(&fds[0]), ready(&fds[1]));
            if died {
                self.reap();
            }
            if !asked {
                continue;
            }
            let forked = match self.receive()? {
                Received::Nothing => continue,
                Received::End => return Ok(Ended::Zygote),
                Received::Request(Ok(ZygoteRequest::Fork { slot }), tap) => self.fork(slot, tap),
                Received::Request(Err(error), _) => Err(error),
            };
            let answer = match forked {
                Ok(Forked::Parent(slot, pid)) => {
                    self.slots.insert(pid, slot);
                    ZygoteReply::Forked { slot, pid: pid.as_raw() }
                }
                Ok(Forked::Child(slot, listener, tap)) => {
                    return Ok(Ended::MicroVm(self.become_microvm(slot, listener, tap)));
                }
                Err(error) => ZygoteReply::Failed { error },
            };
            // A client that is gone is noticed by reading.
            let _ = reply(&self.control, &answer);
        }
    }

    /// The next request, if there is one.
    fn receive(&self) -> Result<Received, ZygoteError> {
        let mut buffer = [0; MESSAGE_MAX];
        let mut ancillary = nix::cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<()>(self.control.as_raw_fd(), &mut slices, Some(&mut ancillary), flags);
        let message = match message {
            Ok(message) => message,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(Received::Nothing),
            Err(nix::Error::ECONNRESET) => return Ok(Received::End),
            Err(errno) => return Err(system("control socket")(errno)),
        };
        let mut descriptors = Vec::new();
        for part in message.cmsgs().map_err(system("control socket"))? {
            if let ControlMessageOwned::ScmRights(received) = part {
                // SAFETY: the kernel has just made these descriptors for this process.
                descriptors.extend(received.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let length = message.bytes;
        if length == 0 {
            return Ok(Received::End);
        }
        let request = decode(&buffer[..length]).map_err(|error| error.to_string());
        Ok(Received::Request(request, descriptors.pop()))
    }

    fn fork(&mut self, slot: u32, tap: Option<OwnedFd>) -> Result<Forked, String> {
        let tap = tap.ok_or("no TAP came with the request")?;
        let listener = listen(&self.run_dir, slot)?;
        // SAFETY: this process has one thread (it never makes another), so the child's memory is as
        // consistent as the parent's.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => Ok(Forked::Parent(slot, child)),
            Ok(ForkResult::Child) => Ok(Forked::Child(slot, listener, tap)),
            Err(errno) => {
                let _ = std::fs::remove_file(socket_path(&self.run_dir, slot));
                Err(format!("fork: {errno}"))
            }
        }
    }

    /// In the child: leaves everything of the zygote's behind and runs the microVM.
    fn become_microvm(self, slot: u32, listener: UnixListener, tap: OwnedFd) -> EndReason {
        let Self {
            control,
            children,
            run_dir,
            watchdog,
            kvm,
            cpuid,
            memory,
            memory_bytes,
            state,
            ..
        } = self;
        drop((control, children));
        let _span = tracing::info_span!("microvm", slot).entered();
        let prepared = setsid()
            .and_then(|_| sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None));
        let reason = match prepared {
            Ok(()) => instance::run(slot, listener, &socket_path(&run_dir, slot), || {
                // Descriptors that are not needed to run are closed here: KVM's and the template's.
                let cloned = Machine::clone_from(&kvm, &cpuid, memory, memory_bytes, &state, tap);
                drop(kvm);
                let mut machine = cloned?;
                machine.set_watchdog(watchdog);
                Ok(machine)
            }),
            Err(errno) => EndReason::Setup { error: errno.to_string() },
        };
        if reason == EndReason::Stopped {
            tracing::info!(%reason, "microVM ended");
        } else {
            tracing::warn!(%reason, "microVM ended");
        }
        reason
    }

    /// Collects processes that ended, and what those that were killed left behind.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.children.read_signal() {}
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => {
                    let Some(slot) = status.pid().and_then(|pid| self.slots.remove(&pid)) else {
                        continue;
                    };
                    if let WaitStatus::Signaled(pid, signal, _) = status {
                        tracing::warn!(slot, %pid, %signal, "microVM was killed");
                        remove_stale(&socket_path(&self.run_dir, slot));
                    }
                }
            }
        }
    }
}

enum Received {
    Nothing,
    /// The client is gone.
    End,
    /// A request with its descriptor, or what is wrong with it.
    Request(Result<ZygoteRequest, String>, Option<OwnedFd>),
}

enum Forked {
    Parent(u32, Pid),
    Child(u32, UnixListener, OwnedFd),
}

fn reply(control: &OwnedFd, reply: &ZygoteReply) -> io::Result<()> {
    send(control.as_raw_fd(), &encode(reply), MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

/// Listens at a slot's socket, unless a microVM lives there.
fn listen(run_dir: &Path, slot: u32) -> Result<UnixListener, String> {
    let path = socket_path(run_dir, slot);
    match UnixListener::bind(&path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {}
        bound => return bound.map_err(|error| format!("{}: {error}", path.display())),
    }
    if !remove_stale(&path) {
        return Err(format!("{}: a microVM lives in slot {slot}: stop it first", path.display()));
    }
    UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Removes a socket that nobody listens on; returns whether it is gone.
fn remove_stale(path: &Path) -> bool {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).is_ok()
        }
        Err(error) => error.kind() == ErrorKind::NotFound,
        Ok(_) => false,
    }
}
