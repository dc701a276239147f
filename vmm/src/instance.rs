//! A microVM's life: parked at its barrier, released with an identity, running until it ends.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use warren_abi::microvm::{COMMAND_PARK, COMMAND_PREFAULT, COMMAND_RELEASE, Identity};

use crate::control::{
    EndReason, PublicIdentity, Ready, Refusal, ReleaseRequest, Reply, Request, State, Status,
    TAG_MAX,
};
use crate::machine::{Exit, Machine, host};
use crate::server::{Event, Server};

/// How often sockets are looked at while the guest is kept busy by its network.
const SOCKET_INTERVAL: Duration = Duration::from_millis(1);

/// What is in the identity page of a parked clone.
const NOBODY: Identity = Identity {
    wall_clock_ns: 0,
    tsc: 0,
    tsc_hz: 0,
    entropy: [0; 64],
    instance_id: [0; 16],
    hostname: [0; 64],
    ipv4: [0; 4],
    gateway: [0; 4],
    mac: [0; 6],
    mtu: 0,
};

/// One microVM with its socket.
pub struct Instance {
    slot: u32,
    machine: Machine,
    server: Server,
    tsc_hz: u64,
    released: Option<ReleaseRequest>,
    polled_at: Instant,
}

/// Runs a microVM until it ends, and tells its clients why.
///
/// `make` makes the machine; if it cannot, clients hear of that as well. When they hear that it
/// ended its slot is free: the TAP is closed and the socket at `path` removed. What takes long,
/// giving memory and machine back to the kernel, comes after.
pub fn run(
    slot: u32,
    listener: UnixListener,
    path: &Path,
    make: impl FnOnce() -> Result<Machine, EndReason>,
) -> EndReason {
    let mut server = match Server::new(listener) {
        Ok(server) => server,
        Err(error) => return EndReason::Setup { error: error.to_string() },
    };
    let machine = match make() {
        Ok(machine) => machine,
        Err(reason) => {
            let _ = std::fs::remove_file(path);
            server.ended(&reason);
            return reason;
        }
    };
    let polled_at = Instant::now();
    let mut instance = Instance { slot, machine, server, tsc_hz: 0, released: None, polled_at };
    let reason = match instance.live() {
        Ok(never) => match never {},
        Err(reason) => reason,
    };
    instance.machine.net.close_tap();
    let _ = std::fs::remove_file(path);
    instance.server.ended(&reason);
    reason
}

/// A life has no other result than its end.
enum Never {}

impl Instance {
    fn live(&mut self) -> Result<Never, EndReason> {
        self.park()?;
        let (client, request, received_ns) = self.wait_for_release()?;
        let ready = self.release(&request, received_ns)?;
        self.released = Some(request);
        self.server.reply(client, &Reply::Ready(ready));
        loop {
            match self.machine.run()? {
                Exit::Wait(timeout) => {
                    self.serve(timeout)?;
                    self.machine.resumed();
                }
                Exit::Kicked => {
                    self.poll(Some(Duration::ZERO))?;
                }
                exit @ (Exit::Barrier | Exit::Ready) => {
                    return Err(EndReason::Protocol { error: format!("{exit:?} twice") });
                }
            }
        }
    }

    /// Lets the guest take its page faults, so that it has none after the release.
    fn park(&mut self) -> Result<(), EndReason> {
        // The page of the identity becomes this clone's own.
        self.machine.write_identity(&NOBODY)?;
        self.machine.command(COMMAND_PREFAULT)?;
        self.run_until(Exit::Barrier)?;
        self.tsc_hz = self.machine.tsc_hz()?;
        self.machine.command(COMMAND_PARK)
    }

    fn run_until(&mut self, expected: Exit) -> Result<(), EndReason> {
        loop {
            match self.machine.run()? {
                exit if exit == expected => return Ok(()),
                Exit::Kicked => {}
                exit => {
                    let error = format!("{exit:?} instead of {expected:?}");
                    return Err(EndReason::Protocol { error });
                }
            }
        }
    }

    /// Serves clients until one releases; returns who, what and when (`CLOCK_MONOTONIC`, ns).
    fn wait_for_release(&mut self) -> Result<(u64, ReleaseRequest, u64), EndReason> {
        let mut events = Vec::new();
        loop {
            let flags = wait(self.server.poll_fds(), None)?;
            self.server.polled(flags.into_iter(), &mut events);
            let mut release = None;
            for event in events.drain(..) {
                match event {
                    Event::Request(client, Request::Release(request)) if release.is_none() => {
                        match check(&request) {
                            Ok(()) => release = Some((client, request, monotonic_ns()?)),
                            Err(refusal) => self.server.reply(client, &Reply::Refused(refusal)),
                        }
                    }
                    Event::Request(client, Request::Release(_)) => {
                        self.server.reply(client, &Reply::Refused(Refusal::AlreadyReleased));
                    }
                    Event::Request(client, Request::Status) => self.status(client),
                    Event::Request(_, Request::Stop) => return Err(EndReason::Stopped),
                    // The guest has not begun: its port takes the stream when it has.
                    Event::Connect(stream, port) => self.machine.vsock.connect(stream, port),
                }
            }
            if let Some(release) = release {
                return Ok(release);
            }
        }
    }

    /// Gives the guest its identity and lets it go, until it acknowledges.
    fn release(&mut self, request: &ReleaseRequest, received_ns: u64) -> Result<Ready, EndReason> {
        self.machine.net.drain();
        let mut entropy = [0; 64];
        getrandom(&mut entropy)?;
        let public = &request.identity;
        let mut hostname = [0; 64];
        hostname[..public.hostname.len()].copy_from_slice(public.hostname.as_bytes());
        self.machine.command(COMMAND_RELEASE)?;
        let wall_clock = clock_gettime(ClockId::CLOCK_REALTIME).map_err(|errno| host(&errno))?;
        // SAFETY: reads a counter; x86-64 always has it.
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        let released_ns = monotonic_ns()?;
        self.machine.write_identity(&Identity {
            wall_clock_ns: nanoseconds(wall_clock),
            tsc,
            tsc_hz: self.tsc_hz,
            entropy,
            instance_id: public.instance_id,
            hostname,
            ipv4: public.ipv4,
            gateway: public.gateway,
            mac: public.mac,
            mtu: public.mtu,
        })?;
        self.machine.resumed();
        self.run_until(Exit::Ready)?;
        Ok(Ready { received_ns, released_ns, ready_ns: monotonic_ns()? })
    }

    fn status(&mut self, client: u64) {
        let released = self.released.as_ref();
        let status = Status {
            slot: self.slot,
            pid: std::process::id() as i32,
            state: if released.is_some() { State::Running } else { State::Parked },
            identity: released.map(|request| request.identity.clone()),
            tag: released.map(|request| request.tag.clone()).unwrap_or_default(),
        };
        self.server.reply(client, &Reply::Status(status));
    }

    /// The guest waits: moves packets both ways, and sleeps until one comes for the guest or the
    /// time is over.
    fn serve(&mut self, timeout: Option<Duration>) -> Result<(), EndReason> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let memory = self.machine.ram.dma();
            self.machine.net.transmit(memory)?;
            self.machine.vsock.transmit(memory)?;
            let mut received = self.machine.net.receive(memory)?;
            received |= self.machine.vsock.receive(memory)?;
            let now = Instant::now();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            let over = left.is_some_and(|left| left.is_zero());
            if received || over {
                // Clients are heard even if the guest is never without packets.
                if now.duration_since(self.polled_at) >= SOCKET_INTERVAL {
                    self.poll(Some(Duration::ZERO))?;
                }
                return Ok(());
            }
            self.poll(left)?;
        }
    }

    /// Waits for sockets, streams and TAP, and serves the sockets.
    fn poll(&mut self, timeout: Option<Duration>) -> Result<(), EndReason> {
        let tap = self.machine.net.poll_fd(self.machine.ram.dma())?;
        let has_tap = tap.is_some();
        let fds = tap.map(|fd| (fd, PollFlags::POLLIN)).into_iter();
        let streams = self.machine.vsock.poll_fds().count();
        let fds = fds.chain(self.machine.vsock.poll_fds()).chain(self.server.poll_fds());
        let mut flags = wait(fds, timeout)?.into_iter();
        self.polled_at = Instant::now();
        if has_tap && flags.next().is_some_and(|flags| flags.contains(PollFlags::POLLERR)) {
            tracing::warn!("the microVM's TAP is gone: its interface was removed");
            self.machine.net.close_tap();
        }
        self.machine.vsock.polled(flags.by_ref().take(streams));
        let mut events = Vec::new();
        self.server.polled(flags, &mut events);
        for event in events {
            match event {
                Event::Request(client, Request::Status) => self.status(client),
                Event::Request(client, Request::Release(_)) => {
                    self.server.reply(client, &Reply::Refused(Refusal::AlreadyReleased));
                }
                Event::Request(_, Request::Stop) => return Err(EndReason::Stopped),
                Event::Connect(stream, port) => self.machine.vsock.connect(stream, port),
            }
        }
        Ok(())
    }
}

fn check(request: &ReleaseRequest) -> Result<(), Refusal> {
    let identity = &request.identity;
    let refuse = |what: &str| Err(Refusal::Identity(what.to_owned()));
    if identity.hostname.len() > 64 || identity.hostname.contains('\0') {
        return refuse("the host name is longer than 64 bytes or contains a zero byte");
    }
    if identity.mac[0] & 1 == 1 || identity.mac == [0; 6] {
        return refuse("the MAC address is not that of one station");
    }
    if !(576..=1500).contains(&identity.mtu) {
        return refuse("the MTU is not between 576 and 1500");
    }
    for address in [identity.ipv4, identity.gateway] {
        let address = std::net::Ipv4Addr::from(address);
        if address.is_unspecified() || address.is_multicast() || address.is_broadcast() {
            return refuse("address or gateway is not that of one host");
        }
    }
    if request.tag.len() > TAG_MAX {
        return refuse("the tag is longer than 4096 bytes");
    }
    Ok(())
}

impl PublicIdentity {
    /// Whether a microVM would take this identity.
    ///
    /// # Errors
    /// [`Refusal::Identity`] with the field that is out of range.
    pub fn check(&self) -> Result<(), Refusal> {
        check(&ReleaseRequest { identity: self.clone(), tag: Vec::new() })
    }
}

/// Waits for descriptors; a signal ends the wait without any being ready.
fn wait<'fd>(
    fds: impl Iterator<Item = (std::os::fd::BorrowedFd<'fd>, PollFlags)>,
    timeout: Option<Duration>,
) -> Result<Vec<PollFlags>, EndReason> {
    let mut fds: Vec<PollFd> = fds.map(|(fd, flags)| PollFd::new(fd, flags)).collect();
    let empty = vec![PollFlags::empty(); fds.len()];
    match ppoll(&mut fds, timeout.map(TimeSpec::from), None::<SigSet>) {
        Ok(0) | Err(nix::Error::EINTR) => Ok(empty),
        Ok(_) => Ok(fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect()),
        Err(errno) => Err(host(&errno)),
    }
}

fn getrandom(buffer: &mut [u8; 64]) -> Result<(), EndReason> {
    // SAFETY: the buffer has that many bytes. Up to 256 are never cut short (getrandom(2)).
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if got == buffer.len() as isize { Ok(()) } else { Err(host(&std::io::Error::last_os_error())) }
}

fn monotonic_ns() -> Result<u64, EndReason> {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(nanoseconds).map_err(|errno| host(&errno))
}

fn nanoseconds(time: TimeSpec) -> u64 {
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}
