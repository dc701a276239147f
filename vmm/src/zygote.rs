//! The zygote: a single-threaded process that holds the verified template and forks microVMs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, MsgFlags, send, sendmsg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use tracing::Span;

use crate::clock::monotonic_ns;
use crate::control::{
    EndReason, MESSAGE_MAX, Tier, Timeline, ZygoteReply, ZygoteRequest, decode, encode,
    receive_with_descriptor, socket_path,
};
use crate::cpu;
use crate::instance::{self, Origin};
use crate::jail::{Cell, Jail, JailConfig, JailError, Place};
use crate::machine::host;
use crate::make::Make;
use crate::memory::GuestRam;
use crate::rates::Rates;
use crate::snapshot::{Given, Sources, Template};
use crate::template::{self, TemplateError};

/// Why a zygote cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// The template or KVM cannot be used. The client was told.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The jail cannot be built. The client was told.
    #[error(transparent)]
    Jail(#[from] JailError),
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
    /// Each clone's; the zygote never touches its memory.
    origin: Origin,
    make: Make,
    jail: Jail,
    /// Not dropped in a child: to free it would copy the zygote's pages that it lies in.
    living: ManuallyDrop<Census>,
}

/// What a zygote is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// What clones are made from.
    pub sources: Sources,
    /// The client's first message is [`ZygoteRequest::Memory`].
    pub takes_memory: bool,
    /// Directory of the microVMs' sockets.
    pub run_dir: PathBuf,
    /// How microVMs are confined.
    pub jail: JailConfig,
    /// What their devices may move.
    pub rates: Rates,
    /// How long a guest may run without an exit.
    pub watchdog: Duration,
}

/// Loads the template, builds the jail and serves the control socket until it is closed.
///
/// # Errors
/// The template cannot be used or the jail cannot be built, which the client is told as well; or the
/// host fails.
pub fn run(options: &Options, control: OwnedFd) -> Result<Ended, ZygoteError> {
    let (mut zygote, memory) = match Zygote::new(options, control) {
        Ok(made) => made,
        Err((control, error)) => {
            let _ = reply(&control, &ZygoteReply::Failed { error: error.to_string() });
            return Err(error);
        }
    };
    let (make, template) = (zygote.make, zygote.origin.base.template);
    let loaded = encode(&ZygoteReply::Loaded { make, template });
    let slices = [IoSlice::new(&loaded)];
    let descriptors = [memory.as_raw_fd()];
    let attached = [ControlMessage::ScmRights(&descriptors)];
    let control = zygote.control.as_raw_fd();
    sendmsg::<()>(control, &slices, &attached, MsgFlags::MSG_NOSIGNAL, None)
        .map_err(system("control socket"))?;
    // It is mapped.
    drop(memory);
    loop {
        match zygote.serve()? {
            Served::Client => {}
            Served::End => return Ok(Ended::Zygote),
            Served::Child(birth) => return Ok(Ended::MicroVm(zygote.become_microvm(birth))),
        }
    }
}

impl Zygote {
    /// Also returns the template's memory.
    fn new(options: &Options, control: OwnedFd) -> Result<(Self, File), (OwnedFd, ZygoteError)> {
        let prepared = || -> Result<_, ZygoteError> {
            let (kvm, cpuid) = template::open_kvm()?;
            // What is found out once, no microVM finds out again.
            cpu::is_emulated();
            drop(span(0));
            let given = options.takes_memory.then(|| take_memory(&control)).transpose()?;
            let template = template::load(&options.sources, given)?;
            let Template { header, memory, base, origin: checksum } = template;
            let disk = template::open_disk(&options.sources, &header)?;
            let ram = GuestRam::clone_of(&memory).map_err(system("map the template's memory"))?;
            let make = Make::new(&checksum, &options.jail, &options.rates);
            let jail = Jail::build(
                &options.jail,
                header.machine.kind(),
                memory.bytes(),
                &options.run_dir,
            )?;
            // Blocked in the zygote and read from a descriptor; unblocked again in each microVM.
            let mut child = SigSet::empty();
            child.add(Signal::SIGCHLD);
            sigprocmask(SigmaskHow::SIG_BLOCK, Some(&child), None)
                .map_err(system("sigprocmask"))?;
            let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
            let children = SignalFd::with_flags(&child, flags).map_err(system("signalfd"))?;
            jail.confine()?;
            let origin = Origin {
                kvm,
                cpuid,
                ram,
                state: header.machine,
                base,
                disk,
                rates: options.rates,
                watchdog: options.watchdog,
            };
            Ok((origin, memory.base.memfd, make, jail, children))
        };
        match prepared() {
            Err(error) => Err((control, error)),
            Ok((origin, memory, make, jail, children)) => {
                let living = ManuallyDrop::default();
                Ok((Self { control, children, origin, make, jail, living }, memory))
            }
        }
    }

    /// Waits for something to do, and does it.
    fn serve(&mut self) -> Result<Served, ZygoteError> {
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
        // Who asks waits; who died does not.
        if asked {
            let forked = match self.receive()? {
                Received::Nothing => return Ok(Served::Client),
                Received::End => return Ok(Served::End),
                Received::Request(Ok(ZygoteRequest::Fork { slot, tier }), tap) => {
                    self.fork(slot, tier, tap)
                }
                Received::Request(Ok(ZygoteRequest::Memory { .. }), _) => {
                    Err("memory comes first of all".to_owned())
                }
                Received::Request(Err(error), _) => Err(error),
            };
            let answer = match forked {
                Ok(Forked::Parent(slot, pid)) => ZygoteReply::Forked { slot, pid: pid.as_raw() },
                Ok(Forked::Child(birth)) => return Ok(Served::Child(birth)),
                Err(error) => ZygoteReply::Failed { error },
            };
            // A client that is gone is noticed by reading.
            let _ = reply(&self.control, &answer);
        }
        if died {
            self.reap();
        }
        Ok(Served::Client)
    }

    /// The next request, if there is one.
    fn receive(&self) -> Result<Received, ZygoteError> {
        let mut buffer = [0; MESSAGE_MAX];
        let received = receive_with_descriptor(&self.control, &mut buffer, MsgFlags::MSG_DONTWAIT);
        let (length, descriptor) = match received {
            Ok(received) => received,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(Received::Nothing),
            Err(nix::Error::ECONNRESET) => return Ok(Received::End),
            Err(errno) => return Err(system("control socket")(errno)),
        };
        if length == 0 {
            return Ok(Received::End);
        }
        let request = decode(&buffer[..length]).map_err(|error| error.to_string());
        Ok(Received::Request(request, descriptor))
    }

    fn fork(&mut self, slot: u32, tier: Tier, tap: Option<OwnedFd>) -> Result<Forked, String> {
        let asked_ns = monotonic_ns().map_err(|reason| reason.to_string())?;
        let tap = tap.ok_or("no TAP came with the request")?;
        let place = self.jail.prepare(slot, &self.living.places(slot));
        let place = place.map_err(|error| error.to_string())?;
        let listener = listen(slot)?;
        // SAFETY: this process has one thread (it never makes another), so the child's memory is as
        // consistent as the parent's.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => {
                self.living.born(place, child);
                Ok(Forked::Parent(slot, child))
            }
            Ok(ForkResult::Child) => {
                Ok(Forked::Child(Birth { place, tier, asked_ns, listener, tap }))
            }
            Err(errno) => {
                let _ = std::fs::remove_file(socket_name(slot));
                Err(format!("fork: {errno}"))
            }
        }
    }

    /// In the child: leaves everything of the zygote's behind and runs the microVM.
    fn become_microvm(self, birth: Birth) -> EndReason {
        let Self { control, children, origin, make, jail, .. } = self;
        let Birth { place, tier, asked_ns, listener, tap } = birth;
        let slot = place.slot();
        drop((control, children));
        let _span = span(slot).entered();
        let forked_ns = monotonic_ns().unwrap_or_default();
        let timeline = Timeline { asked_ns, forked_ns, ..Timeline::default() };
        let reason = instance::run(slot, make, tier, timeline, listener, || {
            setsid()
                .and_then(|_| sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None))
                .map_err(|errno| host(&errno))?;
            let jailed = jail.enter(place).and_then(Cell::close);
            jailed.map_err(|error| EndReason::Setup { error: error.to_string() })?;
            Ok((origin, tap))
        });
        if reason == EndReason::Stopped {
            tracing::info!(%reason, "microVM ended");
        } else {
            tracing::warn!(%reason, "microVM ended");
        }
        reason
    }

    /// Collects processes that ended, and their sockets.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.children.read_signal() {}
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => status,
            };
            let Some(pid) = status.pid() else { continue };
            let Some((slot, youngest)) = self.living.died(pid) else { continue };
            if let WaitStatus::Signaled(pid, signal, _) = status {
                tracing::warn!(slot, %pid, %signal, "microVM was killed");
            }
            // Another one may listen there by now.
            if youngest {
                let _ = std::fs::remove_file(socket_name(slot));
            }
        }
    }
}

/// What a child is born with.
struct Birth {
    place: Place,
    tier: Tier,
    asked_ns: u64,
    listener: UnixListener,
    tap: OwnedFd,
}

/// The processes that live.
#[derive(Default)]
struct Census {
    slots: HashMap<Pid, u32>,
    /// Those of each slot, the youngest last: the others told their clients of their end.
    of_slots: HashMap<u32, Vec<(Pid, Place)>>,
}

impl Census {
    fn places(&self, slot: u32) -> Vec<Place> {
        let living = self.of_slots.get(&slot).into_iter().flatten();
        living.map(|(_, place)| *place).collect()
    }

    fn born(&mut self, place: Place, pid: Pid) {
        self.slots.insert(pid, place.slot());
        self.of_slots.entry(place.slot()).or_default().push((pid, place));
    }

    /// Strikes a process off; returns its slot, and whether it was the youngest there.
    fn died(&mut self, pid: Pid) -> Option<(u32, bool)> {
        let slot = self.slots.remove(&pid)?;
        let living = self.of_slots.get_mut(&slot)?;
        let youngest = living.last().is_some_and(|(last, _)| *last == pid);
        living.retain(|(other, _)| *other != pid);
        if living.is_empty() {
            self.of_slots.remove(&slot);
        }
        Some((slot, youngest))
    }
}

/// What a turn of the zygote's came to.
enum Served {
    /// Whoever wanted something has it.
    Client,
    /// The control socket was closed.
    End,
    /// This process is the child.
    Child(Birth),
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
    Child(Birth),
}

/// The span that a microVM's events are in.
fn span(slot: u32) -> Span {
    tracing::info_span!("microvm", slot)
}

/// The memory that a client has for its zygote, and the checksum of its template.
fn take_memory(control: &OwnedFd) -> Result<Given, ZygoteError> {
    let mut buffer = [0; MESSAGE_MAX];
    let mut fds = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::NONE).map_err(system("control socket"))?;
    let (length, memfd) = receive_with_descriptor(control, &mut buffer, MsgFlags::empty())
        .map_err(system("control socket"))?;
    let asked = decode(&buffer[..length]);
    if let (Ok(ZygoteRequest::Memory { template }), Some(memfd)) = (asked, memfd) {
        return Ok(Given { template, memfd: memfd.into() });
    }
    let error = io::Error::other("no memory came, although it was said that it would");
    Err(system("control socket")(error))
}

fn reply(control: &OwnedFd, reply: &ZygoteReply) -> io::Result<()> {
    send(control.as_raw_fd(), &encode(reply), MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

/// Where the microVM in a slot listens, seen from the zygote's working directory.
fn socket_name(slot: u32) -> PathBuf {
    socket_path(Path::new("."), slot)
}

/// Listens at a slot's socket, unless a microVM lives there.
fn listen(slot: u32) -> Result<UnixListener, String> {
    let path = socket_name(slot);
    match UnixListener::bind(&path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {}
        bound => return bound.map_err(|error| format!("{}: {error}", path.display())),
    }
    let stale = match UnixStream::connect(&path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(&path).is_ok()
        }
        Err(error) => error.kind() == ErrorKind::NotFound,
        Ok(_) => false,
    };
    if !stale {
        return Err(format!("{}: a microVM lives in slot {slot}: stop it first", path.display()));
    }
    UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))
}
