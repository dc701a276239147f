//! A proxy node: the data path, and which of VPCs' shared addresses it owns. Proxies watch each other
//! and take over what another can serve no more. Nobody else is needed for it.
//!
//! [`session`] finds out who forwards, `reach` which VPCs can be reached, [`succession`] who is to own
//! what, `told` which hosts are told of it; this is the thread that does it.

mod load;
mod message;
mod reach;
pub mod session;
pub mod succession;
mod told;
mod way;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use warren_abi::bfd::{self, Control};
use warren_abi::claim::{self, Entry, kind};
use warren_abi::wire::Ip;
use warren_proto::v1;

use self::load::Meter;
use self::message::Message;
use self::session::{INTERVAL, Session, State};
use self::succession::{Health, Move, Standing, Statement, Succession};
use self::told::Told;
use self::way::Ways;
use crate::announce::Announcer;
use crate::clock::monotonic_ns;
use crate::datapath::{Changed, DropCount, Error, LinkEvents, ProxyDatapath, ProxyVpc};
use crate::eni::{Assignment, EniProvider};

/// A daemon that did not ask for so long is not there.
const ORPHANED: Duration = Duration::from_millis(150);
/// For so long, what others say is waited for: after the start, and after being isolated or away.
const SETTLING: Duration = Duration::from_millis(200);
/// Who did not look for so long has missed what others did, and what they did not do any more.
const AWAY: Duration = Duration::from_secs(1);
/// How often a proxy says what it has said before.
const REPEAT: Duration = Duration::from_secs(1);
/// How often is decided at least: some of it depends on the time alone.
const AT_LEAST: Duration = Duration::from_millis(100);
/// How often something new is said.
const BURST: u32 = 3;
/// So many hosts are asked whether this proxy is isolated, when no other proxy answers.
const WITNESSES: usize = 4;
/// When addresses are announced again, after the first time at once: an announcement may be lost.
const AGAIN: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// A proxy node, at work on a thread of its own until it is dropped.
pub struct Proxy {
    own: Ip,
    datapath: Arc<ProxyDatapath>,
    /// Where the proxies of VPCs are kept for a daemon that restarts.
    file: PathBuf,
    /// Of BFD's requests.
    sessions: UdpSocket,
    /// Of claims.
    claims: UdpSocket,
    links: LinkEvents,
    /// Asks neighbours.
    announcer: Announcer,
    /// Have addresses come here.
    providers: Vec<Box<dyn EniProvider>>,
    meter: Meter,
    state: Mutex<Inner>,
}

struct Inner {
    succession: Succession,
    sessions: BTreeMap<Ip, Session>,
    told: Told,
    /// The proxies of each VPC, the first one first; and the hosts that hold ports.
    proxies: BTreeMap<u32, Vec<IpAddr>>,
    hosts: BTreeMap<u32, BTreeSet<Ip>>,
    ways: Ways,
    settled_at: Instant,
    /// Whether this proxy reaches others, or at least hosts; none: that is not known yet.
    witness: Option<bool>,
    /// When a node was last found to be down, and when any last answered.
    lost_at: Option<Instant>,
    answered_at: Instant,
    /// What the last decision was made on; and whether more than that is new since, or it is to be
    /// made again for time went by.
    view: (Standing, BTreeMap<Ip, Health>),
    is_new: bool,
    decide_at: Instant,
    turned_at: Instant,
    /// How often what this proxy says is said again at once.
    burst: u32,
    repeat_at: Instant,
    /// When, and of which VPCs, addresses are announced again.
    announcements: BTreeSet<(Instant, u32)>,
}

impl Proxy {
    /// Begins with what the data path knows, and with the proxies that `file` holds.
    ///
    /// Sockets are those of the calling thread's network namespace. `own` is the address in the
    /// underlay. `providers` have addresses come here, each in its own way.
    ///
    /// # Errors
    /// If sockets cannot be opened or the file cannot be read.
    pub fn start(
        datapath: Arc<ProxyDatapath>,
        own: IpAddr,
        file: &Path,
        providers: Vec<Box<dyn EniProvider>>,
    ) -> Result<Arc<Self>, Error> {
        let socket = |port| {
            let socket = UdpSocket::bind((own, port))
                .and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
            socket.map_err(|source| Error::system("open", format!("UDP port {port}"), source))
        };
        let now = Instant::now();
        let mut state = Inner {
            succession: Succession::new(own.into()),
            sessions: BTreeMap::new(),
            told: Told::default(),
            proxies: load(file)?,
            hosts: BTreeMap::new(),
            ways: Ways::default(),
            settled_at: now + SETTLING,
            witness: Some(true),
            lost_at: None,
            answered_at: now,
            view: (Standing::Settling, BTreeMap::new()),
            is_new: true,
            decide_at: now,
            turned_at: now,
            burst: BURST,
            repeat_at: now,
            announcements: BTreeSet::new(),
        };
        for vpc in datapath.vpcs()? {
            // Without any, who may own its addresses is not known: they stay where they are.
            let proxies = state.proxies.get(&vpc.vni).cloned().unwrap_or_default();
            state.know(&vpc, vpc.claim, proxies, now);
            state.ways.find(&datapath, &vpc, now)?;
            if vpc.claim.is_some() {
                // A former daemon may not have been done with it.
                state.announcements.insert((now + SETTLING, vpc.vni));
            }
        }
        state.proxies.retain(|vni, _| state.hosts.contains_key(vni));
        for (vni, public) in state.ways.publics() {
            state.succession.remove(public);
            datapath.set_claim(public, state.succession.claim(vni))?;
        }
        let proxy = Arc::new(Self {
            own: own.into(),
            datapath,
            file: file.to_owned(),
            sessions: socket(0)?,
            claims: socket(claim::PORT)?,
            links: LinkEvents::open()?,
            announcer: Announcer::open()
                .map_err(|source| Error::system("open", "packet socket", source))?,
            providers,
            meter: Meter::default(),
            state: Mutex::new(state),
        });
        proxy.check_carriers(&Changed::All);
        let weak = Arc::downgrade(&proxy);
        std::thread::Builder::new()
            .name("proxy".to_owned())
            .spawn(move || run(&weak))
            .map_err(|source| Error::system("start", "thread", source))?;
        Ok(proxy)
    }

    /// Makes a VPC known to the data path, or replaces what was known. `proxies` may own its
    /// addresses, the first one first; without any, it is this one alone.
    pub fn apply_vpc(&self, vpc: &ProxyVpc, proxies: &[IpAddr]) -> Result<(), Error> {
        let vni = vpc.vni;
        let mut state = self.lock();
        let (claim, public) = (state.claim(vni), state.ways.public_of(vni));
        self.datapath.apply_vpc(&ProxyVpc { claim, ..vpc.clone() })?;
        let alone = vec![IpAddr::from(self.own)];
        let proxies = if proxies.is_empty() { alone } else { proxies.to_vec() };
        state.know(vpc, None, proxies, Instant::now());
        self.save(&state.proxies)?;
        state.ways.find(&self.datapath, vpc, Instant::now())?;
        if let Some(former) = public.filter(|_| vpc.public != public) {
            state.release(former, claim);
        }
        if let Some(public) = vpc.public {
            self.bind(&mut state, public, claim)?;
        }
        if state.ways.private_of(vni).is_some() {
            state.announce_soon(vni, Instant::now());
        }
        state.will(&[vni]);
        (state.burst, state.is_new) = (BURST, true);
        self.decide(&mut state);
        Ok(())
    }

    /// Forgets a VPC.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> {
        let mut state = self.lock();
        self.datapath.remove_vpc(vni)?;
        let (claim, public) = (state.succession.claim(vni), state.ways.public_of(vni));
        state.succession.remove(vni);
        self.providers.iter().for_each(|provider| provider.leave(vni));
        state.told.forget(vni);
        state.hosts.remove(&vni);
        state.ways.lose(vni);
        state.proxies.remove(&vni);
        if let Some(public) = public {
            state.release(public, claim);
        }
        self.save(&state.proxies)
    }

    /// Makes the owner of a VPC, by this claim, that of its public address: a cloud's network card drops
    /// what comes from an address that is another's.
    fn bind(&self, state: &mut Inner, public: u32, claim: Option<u32>) -> Result<(), Error> {
        if state.succession.remove(public) {
            state.announce_soon(public, Instant::now());
        }
        self.datapath.set_claim(public, claim)
    }

    /// Of how many VPCs this proxy owns the addresses.
    pub fn owned(&self) -> u32 {
        self.lock().succession.held().count() as u32
    }

    /// What it had to do since this was called last.
    pub fn load(&self) -> v1::ProxyLoad {
        let told = |error: &Error| tracing::error!(%error, "cannot tell how much there is to do");
        self.datapath
            .carried()
            .inspect_err(told)
            .map(|it| self.meter.measure(it))
            .unwrap_or_default()
    }

    /// What was dropped, per VNI and reason.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> {
        self.datapath.drops()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // What a panic leaves half done, the next turn completes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in everything that came, and does what is due. Returns when the next turn is.
    fn turn(&self) -> Instant {
        let mut state = self.lock();
        self.receive_answers(&mut state);
        self.receive_messages(&mut state);
        let now = Instant::now();
        if now.duration_since(std::mem::replace(&mut state.turned_at, now)) >= AWAY {
            state.succession.forget_others();
            (state.settled_at, state.burst) = (now + SETTLING, BURST);
        }
        let changed = self.links.take();
        if changed != Changed::Links(Vec::new()) {
            drop(state);
            self.check_carriers(&changed);
            state = self.lock();
        }
        self.ask(&mut state);
        self.ask_neighbours(&mut state);
        self.decide(&mut state);
        let now = Instant::now();
        let next = state.told.next().into_iter().chain([now + INTERVAL / 2]).min();
        next.unwrap_or(now)
    }

    /// Asks who is to be asked, and concludes from who did not answer.
    fn ask(&self, state: &mut Inner) {
        let now = Instant::now();
        let Inner { succession, sessions, hosts, .. } = state;
        for (node, session) in sessions.iter_mut() {
            if session.conclude(now) {
                tracing::warn!(node = %IpAddr::from(*node), "does not forward any more");
                state.lost_at = Some(now);
            }
        }
        let state_of = |sessions: &BTreeMap<Ip, Session>, node: &Ip| {
            sessions.get(node).map_or(State::Init, Session::state)
        };
        let mut wanted = succession.others();
        let is_alone =
            !wanted.is_empty() && wanted.iter().all(|node| state_of(sessions, node) == State::Down);
        // Whoever hears from nobody may be cut off itself: hosts know. So may be who lost one node and
        // has heard from no other since: they are not lost all in one turn.
        let is_doubtful =
            state.lost_at.is_some_and(|lost| state.answered_at + INTERVAL < lost) && !is_alone;
        let asked = if is_alone || is_doubtful { WITNESSES } else { 0 };
        let witnesses: BTreeSet<Ip> = hosts.values().flatten().take(asked).copied().collect();
        wanted.extend(&witnesses);
        sessions.retain(|node, _| wanted.contains(node));
        succession.retain(|node| wanted.contains(&node));
        for node in wanted {
            let session = sessions.entry(node).or_insert_with(|| Session::new(rand::random()));
            if let Some(request) = session.request(now) {
                // What cannot be sent is not answered.
                self.sessions.send_to(&request.to_bytes(), (IpAddr::from(node), bfd::PORT)).ok();
            }
        }
        let states = || witnesses.iter().map(|node| state_of(sessions, node));
        let witness = match () {
            () if witnesses.is_empty() || states().any(|state| state == State::Up) => Some(true),
            () if is_doubtful => None,
            () if states().all(|state| state == State::Down) => Some(false),
            () => None,
        };
        let is_late = |node| sessions.get(node).is_some_and(Session::is_late);
        if witness != Some(true) && witnesses.iter().any(is_late) {
            state.settled_at = now + SETTLING;
        }
        if witness == Some(false) {
            succession.forget_others();
        }
        if (witness == Some(false)) != (state.witness == Some(false)) {
            let what =
                if witness == Some(false) { "reaches nobody" } else { "reaches others again" };
            tracing::warn!("this proxy {what}");
        }
        state.witness = witness;
    }

    /// Finds out which VPCs can be reached, and asks there who is to be asked.
    fn ask_neighbours(&self, state: &mut Inner) {
        let changed = state.ways.turn(&self.datapath, &self.announcer, Instant::now());
        state.will(&changed);
    }

    fn receive_answers(&self, state: &mut Inner) {
        let mut bytes = [0; size_of::<Control>()];
        while let Some((length, from)) = receive(&self.sessions, &mut bytes) {
            let Some(session) = state.sessions.get_mut(&Ip::from(from.ip())) else { continue };
            let before = session.state();
            let is_whole = length == bytes.len() && from.port() == bfd::PORT;
            if is_whole && session.answered(&Control::from_bytes(bytes)) {
                state.answered_at = Instant::now();
            }
            if before == State::Down && session.state() == State::Up {
                tracing::info!(node = %from.ip(), "forwards again");
                state.burst = BURST;
                // It may have told VPCs that it owns what this one does.
                let held = state.succession.held().flat_map(|vni| state.ways.with_public(vni));
                state.announcements.extend(held.map(|vni| (Instant::now() + SETTLING, vni)));
            }
        }
    }

    fn receive_messages(&self, state: &mut Inner) {
        let now = Instant::now();
        let mut bytes = [0; 2048];
        while let Some((length, from)) = receive(&self.claims, &mut bytes) {
            let from = Ip::from(from.ip());
            let Some(message) = bytes.get(..length).and_then(Message::from_bytes) else { continue };
            let is_other = state.succession.others().contains(&from);
            state.sessions.get_mut(&from).into_iter().for_each(Session::spoke);
            match message.kind {
                kind::KNOWN => {
                    for entry in message.entries {
                        let (vni, sequence) = (entry.vni(), entry.sequence());
                        if state.told.known(from, vni, sequence, now) {
                            state.is_new |= state.succession.outbid(vni, sequence, now);
                        }
                    }
                }
                kind::QUERY if is_other => state.burst = BURST,
                kind::STATEMENTS if is_other => {
                    for entry in message.entries {
                        let statement = statement(entry);
                        state.is_new |= state.succession.hear(from, entry.vni(), statement, now);
                    }
                }
                _ => {}
            }
        }
    }

    /// Decides who owns what, and tells those who must know.
    fn decide(&self, state: &mut Inner) {
        let now = Instant::now();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let sessions = &state.sessions;
        let others = state.succession.others().into_iter();
        let health = others.map(|node| (node, self.health(sessions.get(&node), node, now)));
        let health = health.collect::<BTreeMap<_, _>>();
        // Somebody whose daemon is there has not said yet what it owns.
        let is_silent = |(node, health): (&Ip, &Health)| {
            matches!(health, Health::Up | Health::Shaky) && !state.succession.has_heard(*node)
        };
        let standing = match () {
            () if state.witness == Some(false) => Standing::Isolated,
            () if state.witness.is_none() => Standing::Settling,
            () if now < state.settled_at && !health.is_empty() => Standing::Settling,
            () if now < state.settled_at + REPEAT && health.iter().any(is_silent) => {
                Standing::Settling
            }
            () => Standing::Settled,
        };
        let view = (standing, health);
        if state.is_new || view != state.view || now >= state.decide_at {
            let health = |node| view.1.get(&node).copied().unwrap_or(Health::Unknown);
            let moves = state.succession.decide((now, unix as u32), standing, health);
            for what in &moves {
                self.carry_out(state, *what, now);
            }
            if !moves.is_empty() {
                state.burst = BURST;
            }
            (state.is_new, state.view, state.decide_at) = (false, view, now + AT_LEAST);
        }
        self.say(state, now);
        for (host, message) in state.told.packets(now) {
            self.send(&message, host);
        }
        while let Some((due, vni)) = state.announcements.first().copied() {
            if due > now {
                break;
            }
            state.announcements.pop_first();
            self.announce(state, vni);
        }
    }

    fn health(&self, session: Option<&Session>, node: Ip, now: Instant) -> Health {
        let Some(session) = session else { return Health::Unknown };
        let heard = || match self.datapath.heard(node.into()) {
            Ok(heard) => heard.map(|heard| monotonic_ns().saturating_sub(heard)),
            Err(error) => {
                tracing::error!(%error, "cannot tell whether another proxy's daemon is there");
                None
            }
        };
        match session.state() {
            State::Init => Health::Unknown,
            State::Down => Health::Down,
            State::Up if heard().is_none_or(|ns| u128::from(ns) > ORPHANED.as_nanos()) => {
                Health::Orphaned
            }
            State::Up if session.is_shaky(now) => Health::Shaky,
            State::Up => Health::Up,
        }
    }

    fn carry_out(&self, state: &mut Inner, what: Move, now: Instant) {
        let (vni, claim) = match what {
            Move::Take { vni, sequence } => (vni, Some(sequence)),
            Move::Leave { vni } => (vni, None),
        };
        for of in state.ways.with_public(vni) {
            if let Err(error) = self.datapath.set_claim(of, claim) {
                tracing::error!(vni, %error, "a VPC's addresses are left to other proxies");
                state.succession.set_willing(vni, false);
                return;
            }
            match claim {
                Some(_) => {
                    state.ways.expect(of, now);
                    state.announce_soon(of, now);
                }
                None => self.providers.iter().for_each(|provider| provider.leave(of)),
            }
        }
        let Some(sequence) = claim else {
            tracing::info!(vni, "does not own the VPC's addresses any more");
            return state.told.forget(vni);
        };
        tracing::info!(vni, sequence, "owns the VPC's addresses");
        if let Some(hosts) = state.hosts.get(&vni) {
            state.told.tell(vni, sequence, hosts, now);
        }
    }

    /// Has the VPC's addresses come here, if they are this proxy's.
    fn announce(&self, state: &Inner, vni: u32) {
        let Some(claim) = state.claim(vni) else { return };
        let announcement = match self.datapath.announcement(vni) {
            Ok(Some(announcement)) => announcement,
            Ok(None) => return,
            Err(error) => return tracing::error!(vni, %error, "addresses do not come here"),
        };
        let assignment = Assignment { vni, claim, announcement };
        for provider in &self.providers {
            if let Err(error) = provider.assign(&assignment) {
                tracing::error!(vni, %error, "a VPC is not told that its shared address moved here");
            }
        }
    }

    /// Says to the other proxies what this one is, if that is due.
    fn say(&self, state: &mut Inner, now: Instant) {
        if state.burst == 0 && now < state.repeat_at {
            return;
        }
        state.burst = state.burst.saturating_sub(1);
        state.repeat_at = now + REPEAT;
        let said = state.succession.statements(now);
        let entries: Vec<_> = said.map(|(vni, said)| entry(vni, said)).collect();
        let messages = Message::statements(&entries);
        let query = Message { kind: kind::QUERY, entries: Vec::new() };
        for other in state.succession.others() {
            for message in &messages {
                self.send(message, other);
            }
            if !state.succession.has_heard(other) {
                self.send(&query, other);
            }
        }
    }

    fn send(&self, message: &Message, to: Ip) {
        let to = SocketAddr::new(to.into(), claim::PORT);
        // Whatever is lost is sent again.
        self.claims.send_to(&message.to_bytes(), to).ok();
    }

    /// Finds out whether VPCs can be reached whose interfaces may have changed.
    fn check_carriers(&self, changed: &Changed) {
        let mut state = self.lock();
        let all = || state.hosts.keys().copied().collect();
        let of_link = |link: &u32| self.datapath.vpcs_at(*link).unwrap_or_default();
        let vnis: BTreeSet<u32> = match changed {
            Changed::All => all(),
            Changed::Links(links) => links.iter().flat_map(of_link).collect(),
        };
        for vni in &vnis {
            let is_there = self.datapath.has_carrier(*vni).unwrap_or_else(|error| {
                tracing::error!(vni, %error, "cannot tell whether a VPC can be reached");
                true
            });
            if state.ways.set_carrier(*vni, is_there) {
                tracing::warn!(vni, is_there, "the carrier of a VPC's interface changed");
            }
        }
        state.will(&vnis.into_iter().collect::<Vec<_>>());
    }

    /// Keeps the proxies of VPCs.
    fn save(&self, proxies: &BTreeMap<u32, Vec<IpAddr>>) -> Result<(), Error> {
        let new = self.file.with_extension("new");
        let text = serde_json::to_vec(proxies).map_err(io::Error::other);
        text.and_then(|text| std::fs::write(&new, text))
            .and_then(|()| std::fs::rename(&new, &self.file))
            .map_err(|source| Error::system("write", self.file.display(), source))
    }
}

impl Inner {
    /// The claim by which this proxy owns an address now.
    fn claim(&self, vni: u32) -> Option<u32> {
        self.succession.claim(self.ways.private_of(vni).unwrap_or(vni))
    }

    /// Has an address announced now, and a few times more.
    fn announce_soon(&mut self, vni: u32, now: Instant) {
        let all = [Duration::ZERO].into_iter().chain(AGAIN);
        self.announcements.extend(all.map(|pause| (now + pause, vni)));
    }

    /// Has a public address be one for itself again, which this proxy owns by this claim.
    fn release(&mut self, public: u32, claim: Option<u32>) {
        if let Some(proxies) = self.proxies.get(&public) {
            let order = proxies.iter().copied().map(Ip::from).collect();
            self.succession.apply(public, order, claim, Instant::now());
        }
    }

    /// Settles whether this proxy wants these VPCs' addresses, and those of VPCs to which they are the
    /// way out: if it can reach the VPC, and its way out.
    fn will(&mut self, vnis: &[u32]) {
        let leaving = vnis.iter().filter_map(|vni| self.ways.private_of(*vni));
        let all: Vec<_> = vnis.iter().copied().chain(leaving).collect();
        for vni in all {
            let is_open = self.ways.is_open(vni);
            if self.succession.set_willing(vni, is_open) {
                (self.burst, self.is_new) = (BURST, true);
            }
        }
    }

    fn know(&mut self, vpc: &ProxyVpc, claim: Option<u32>, proxies: Vec<IpAddr>, now: Instant) {
        let vni = vpc.vni;
        let order = proxies.iter().copied().map(Ip::from).collect();
        // Who owns a public address is settled by who owns the VPC that leaves by it.
        if self.ways.private_of(vni).is_none() {
            self.succession.apply(vni, order, claim, now);
        }
        self.proxies.insert(vni, proxies);
        let hosts = vpc.holders.iter().map(|(_, host)| Ip::from(*host)).collect();
        if let Some(sequence) = self.succession.claim(vni) {
            self.told.tell(vni, sequence, &hosts, now);
        }
        self.hosts.insert(vni, hosts);
    }
}

fn entry(vni: u32, said: Statement) -> Entry {
    let owner = if said.is_owner { Entry::OWNER } else { 0 };
    let unwilling = if said.is_willing { 0 } else { Entry::UNWILLING };
    Entry::new(vni, said.sequence, owner | unwilling)
}

fn statement(entry: Entry) -> Statement {
    Statement {
        sequence: entry.sequence(),
        is_owner: entry.flags & Entry::OWNER != 0,
        is_willing: entry.flags & Entry::UNWILLING == 0,
    }
}

fn load(file: &Path) -> Result<BTreeMap<u32, Vec<IpAddr>>, Error> {
    let read = match std::fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error),
    };
    read.map_err(|source| Error::system("read", file.display(), source))
}

fn receive(socket: &UdpSocket, bytes: &mut [u8]) -> Option<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(bytes) {
            Ok(received) => return Some(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // An ICMP error, of something sent before.
            Err(_) => {}
        }
    }
}

/// The thread: ends when the proxy is gone.
fn run(proxy: &Weak<Proxy>) {
    while let Some(proxy) = proxy.upgrade() {
        let next = proxy.turn();
        let left = next.saturating_duration_since(Instant::now());
        let timeout =
            PollTimeout::try_from(left.as_millis() as u32 + 1).unwrap_or(PollTimeout::MAX);
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let (sessions, claims) = (proxy.sessions.as_fd(), proxy.claims.as_fd());
        let mut fds = [sessions, claims, proxy.links.as_fd()].map(readable);
        // Interrupted or not: the next turn finds out what came.
        poll(&mut fds, timeout).ok();
    }
}
