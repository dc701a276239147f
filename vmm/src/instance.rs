//! A microVM's life: parked at its barrier, released with an identity, running until it ends.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;

use crate::clock::monotonic_ns;
use crate::control::{
    EndReason, GuestKind, PublicIdentity, Refusal, ReleaseRequest, Reply, Request, State, Status,
    TAG_MAX, Tier, Timeline,
};
use crate::devices::Device;
use crate::machine::{Exit, Machine, MachineState, Shell, host};
use crate::make::Make;
use crate::memory::GuestRam;
use crate::rates::Rates;
use crate::server::{Event, Server};
use crate::snapshot::diff::{Base, Snapshot};
use crate::timer::kick_on_input;

/// How often sockets are looked at while the guest is kept busy by its network.
const SOCKET_INTERVAL: Duration = Duration::from_millis(1);

/// What all machines of a zygote's are made from, each in a process of its own.
pub struct Origin {
    /// KVM.
    pub kvm: Kvm,
    /// The processor to offer.
    pub cpuid: CpuId,
    /// The template's memory, mapped as each clone has it, and not touched yet.
    pub ram: GuestRam,
    /// The template's processor and devices.
    pub state: MachineState,
    /// What its snapshots are diffs against, which also tells what a clone will use.
    pub base: Base,
    /// The function's image, for a Linux guest that has one.
    pub disk: Option<File>,
    /// What its devices may move.
    pub rates: Rates,
    /// How long the guest may run without an exit.
    pub watchdog: Duration,
}

/// One microVM with its socket.
struct Instance {
    slot: u32,
    make: Make,
    server: Server,
    timeline: Timeline,
    state: State,
    /// How far it is to go before it is released.
    wanted: Tier,
    /// Who asked for it to go on, and how far.
    advancing: Vec<(u64, Tier)>,
    /// Who released it, and as whom.
    release: Option<(u64, ReleaseRequest)>,
    /// Who wants it recycled.
    recycling: Option<u64>,
    /// Who wants a snapshot of it.
    snapshots: Vec<u64>,
    /// What that is a diff against.
    base: Base,
    /// Streams that came before there was a device.
    streams: Vec<(UnixStream, u32)>,
    polled_at: Instant,
}

/// Runs a microVM until it ends, and tells its clients why.
///
/// `enter` makes the process what it is to be, and has the slot's TAP; if that or anything later
/// fails, clients hear of it as well. When they hear that it ended its slot is free: the TAP is closed, and nobody listens at
/// its socket. What takes long, giving memory and machine back to the kernel, comes after.
pub fn run(
    slot: u32,
    make: Make,
    tier: Tier,
    timeline: Timeline,
    listener: UnixListener,
    enter: impl FnOnce() -> Result<(Origin, OwnedFd), EndReason>,
) -> EndReason {
    let server = match Server::new(listener) {
        Ok(server) => server,
        Err(error) => return EndReason::Setup { error: error.to_string() },
    };
    let mut instance = Instance {
        slot,
        make,
        server,
        timeline,
        state: State::Pooled(Tier::Shell),
        wanted: tier,
        advancing: Vec::new(),
        release: None,
        recycling: None,
        snapshots: Vec::new(),
        base: Base::default(),
        streams: Vec::new(),
        polled_at: Instant::now(),
    };
    let mut machine = None;
    let reason = match enter().and_then(|(origin, tap)| instance.live(origin, tap, &mut machine)) {
        Ok(never) => match never {},
        Err(reason) => reason,
    };
    if let Some(machine) = &mut machine {
        machine.net.close_tap();
    }
    instance.server.ended(&reason);
    reason
}

/// A life has no other result than its end.
enum Never {}

impl Instance {
    /// The tiers one after the other, as far as somebody wants them; then the guest's life. The
    /// machine is the caller's to keep, until the end was told.
    fn live(
        &mut self,
        origin: Origin,
        tap: OwnedFd,
        machine: &mut Option<Machine>,
    ) -> Result<Never, EndReason> {
        let Origin { kvm, cpuid, ram, state, base, disk, rates, watchdog } = origin;
        self.base = base;
        self.timeline.jailed_ns = monotonic_ns()?;
        let shell = Shell::new(&kvm, &cpuid, state.kind())?;
        drop(kvm);
        if state.kind() == GuestKind::Linux {
            // It sleeps within KVM.
            self.server.kick_guest().map_err(|error| host(&error))?;
            kick_on_input(&tap).map_err(|errno| host(&errno))?;
        }
        self.reached(Tier::Shell)?;

        self.wait_until_wanted(Tier::Loaded)?;
        self.timeline.loading_ns = monotonic_ns()?;
        if self.release.is_none() {
            ram.populate(&self.base.working_set).map_err(|error| host(&error))?;
        }
        let machine = machine.insert(shell.load(ram, &state, Some(tap), disk)?);
        machine.set_watchdog(watchdog);
        self.reached(Tier::Loaded)?;

        self.wait_until_wanted(Tier::Parked)?;
        if self.release.is_none() {
            self.timeline.parking_ns = monotonic_ns()?;
            machine.park()?;
            self.reached(Tier::Parked)?;
        }
        loop {
            let (client, request) = self.wait_for_release()?;
            for (stream, port) in self.streams.drain(..) {
                machine.vsock.connect(stream, port);
            }
            machine.set_rates(&rates);
            self.release(machine, &request)?;
            self.state = State::Running;
            self.server.reply(client, &Reply::Ready(self.timeline));
            self.release = Some((client, request));
            let client = self.serve_guest(machine)?;
            machine.recycle(&state, &self.base.in_place)?;
            self.state = State::Pooled(Tier::Parked);
            self.release = None;
            self.status(client);
        }
    }

    /// Notes that it came so far, and tells who waits for it.
    fn reached(&mut self, tier: Tier) -> Result<(), EndReason> {
        let now = monotonic_ns()?;
        match tier {
            Tier::Shell => self.timeline.shell_ns = now,
            Tier::Loaded => self.timeline.loaded_ns = now,
            Tier::Parked => self.timeline.parked_ns = now,
        }
        self.state = State::Pooled(tier);
        for (client, wanted) in std::mem::take(&mut self.advancing) {
            if wanted <= tier {
                self.status(client);
            } else {
                self.advancing.push((client, wanted));
            }
        }
        Ok(())
    }

    /// Serves clients until one of them wants it to go on to this tier, or releases it.
    fn wait_until_wanted(&mut self, tier: Tier) -> Result<(), EndReason> {
        while self.wanted < tier && self.release.is_none() {
            self.wait_for_clients()?;
        }
        Ok(())
    }

    /// Serves clients until one releases.
    fn wait_for_release(&mut self) -> Result<(u64, ReleaseRequest), EndReason> {
        loop {
            if let Some(release) = self.release.take() {
                return Ok(release);
            }
            self.wait_for_clients()?;
        }
    }

    /// Waits until a client wants something, before the guest runs.
    fn wait_for_clients(&mut self) -> Result<(), EndReason> {
        let mut events = Vec::new();
        let flags = wait(self.server.poll_fds(), None)?;
        self.server.polled(flags.into_iter(), &mut events);
        for event in events {
            match event {
                Event::Request(client, request) => self.answer(client, request)?,
                // The guest has not begun: its port takes the stream when it has.
                Event::Connect(stream, port) => self.streams.push((stream, port)),
            }
        }
        Ok(())
    }

    fn answer(&mut self, client: u64, request: Request) -> Result<(), EndReason> {
        match request {
            Request::Status => self.status(client),
            Request::Make => self.server.reply(client, &Reply::Make(self.make)),
            Request::Advance(tier) => match self.state {
                State::Pooled(reached) if reached < tier => {
                    self.wanted = self.wanted.max(tier);
                    self.advancing.push((client, tier));
                }
                _ => self.status(client),
            },
            Request::Release(_) if self.release.is_some() => {
                self.server.reply(client, &Reply::Refused(Refusal::AlreadyReleased));
            }
            Request::Release(request) => match check(&request) {
                Ok(()) => {
                    self.timeline.received_ns = monotonic_ns()?;
                    self.release = Some((client, request));
                }
                Err(refusal) => self.server.reply(client, &Reply::Refused(refusal)),
            },
            Request::Recycle if self.state == State::Running => self.recycling = Some(client),
            Request::Snapshot if self.state == State::Running => self.snapshots.push(client),
            Request::Recycle | Request::Snapshot => {
                self.server.reply(client, &Reply::Refused(Refusal::NotReleased));
            }
            Request::Stop => return Err(EndReason::Stopped),
        }
        Ok(())
    }

    /// Runs the guest until somebody wants it recycled; returns who.
    fn serve_guest(&mut self, machine: &mut Machine) -> Result<u64, EndReason> {
        loop {
            if let Some(client) = self.recycling.take() {
                return Ok(client);
            }
            match machine.run()? {
                Exit::Wait(timeout) => self.serve(machine, timeout)?,
                Exit::Kicked => {
                    self.poll(machine, Some(Duration::ZERO))?;
                    if machine.has_interrupts() {
                        machine.exchange()?;
                        for client in self.snapshots.drain(..) {
                            self.server.reply(client, &Reply::Refused(Refusal::LinuxSnapshot));
                        }
                    }
                }
                exit @ (Exit::Barrier | Exit::Ready) => {
                    return Err(EndReason::Protocol { error: format!("{exit:?} twice") });
                }
            }
        }
    }

    /// Gives the guest its identity and lets it go, until it acknowledges.
    fn release(
        &mut self,
        machine: &mut Machine,
        request: &ReleaseRequest,
    ) -> Result<(), EndReason> {
        machine.net.drain(machine.ram.dma())?;
        self.timeline.released_ns = machine.release(&request.identity)?;
        if machine.has_interrupts() {
            machine.exchange()?;
        }
        machine.run_until(Exit::Ready)?;
        self.timeline.ready_ns = monotonic_ns()?;
        Ok(())
    }

    fn status(&mut self, client: u64) {
        let released = match (&self.state, &self.release) {
            (State::Running, Some((_, request))) => Some(request),
            _ => None,
        };
        let status = Status {
            slot: self.slot,
            pid: std::process::id() as i32,
            state: self.state,
            identity: released.map(|request| request.identity.clone()),
            tag: released.map(|request| request.tag.clone()).unwrap_or_default(),
        };
        self.server.reply(client, &Reply::Status(status));
    }

    /// The guest waits: moves packets both ways, and sleeps until one comes for the guest or the
    /// time is over.
    fn serve(&mut self, machine: &mut Machine, timeout: Option<Duration>) -> Result<(), EndReason> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            machine.transmit()?;
            if !self.snapshots.is_empty() {
                self.take_snapshots(machine)?;
            }
            let received = machine.receive()?;
            let now = Instant::now();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            let over = left.is_some_and(|left| left.is_zero()) || self.recycling.is_some();
            if received || over {
                // Clients are heard even if the guest is never without packets.
                if now.duration_since(self.polled_at) >= SOCKET_INTERVAL {
                    self.poll(machine, Some(Duration::ZERO))?;
                }
                return Ok(());
            }
            // What a limit holds goes on by itself.
            let due = machine.net.due().map(|due| due.saturating_duration_since(now));
            self.poll(machine, left.into_iter().chain(due).min())?;
        }
    }

    /// Saves the machine for all who want that. Its guest waits, all that it sent is on its way but
    /// for what a limit holds in the queue, from where it sends that and a clone does not
    /// ([`crate::devices::net::Net::drain`]); nothing was handed to it that it has not seen.
    fn take_snapshots(&mut self, machine: &mut Machine) -> Result<(), EndReason> {
        let snapshot = Snapshot::take(machine, &self.base)?;
        let reply = Reply::Snapshot { bytes: snapshot.bytes() };
        for client in std::mem::take(&mut self.snapshots) {
            self.server.stream(client, &reply, |out| snapshot.write(out));
        }
        Ok(())
    }

    /// Waits for sockets, streams and TAP, and serves the sockets.
    fn poll(&mut self, machine: &mut Machine, timeout: Option<Duration>) -> Result<(), EndReason> {
        let tap = machine.net.poll_fd(machine.ram.dma())?;
        let has_tap = tap.is_some();
        let fds = tap.map(|fd| (fd, PollFlags::POLLIN)).into_iter();
        let streams = machine.vsock.poll_fds().count();
        let fds = fds.chain(machine.vsock.poll_fds()).chain(self.server.poll_fds());
        let mut flags = wait(fds, timeout)?.into_iter();
        self.polled_at = Instant::now();
        if has_tap && flags.next().is_some_and(|flags| flags.contains(PollFlags::POLLERR)) {
            tracing::warn!("the microVM's TAP is gone: its interface was removed");
            machine.net.close_tap();
        }
        machine.vsock.polled(flags.by_ref().take(streams));
        let mut events = Vec::new();
        self.server.polled(flags, &mut events);
        for event in events {
            match event {
                Event::Request(client, request) => self.answer(client, request)?,
                Event::Connect(stream, port) => machine.vsock.connect(stream, port),
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
