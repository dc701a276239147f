//! Which of a VPC's proxies owns its shared addresses, decided by each for itself, without any I/O.
//!
//! The owner is who claimed them last. A claim is made by whoever is next when the owner is gone, is
//! not wanted any more, or does not want them. Who comes back claims nothing: addresses move only
//! when they must.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use warren_abi::claim::Claim;
use warren_abi::wire::Ip;

/// So long, addresses that nobody owns as far as is known are left to the first, and to whoever may
/// own them and did not say so yet.
const PATIENCE: Duration = Duration::from_secs(1);

/// So long, the first of the order is well, and wants the addresses, before whoever owns them leaves
/// them to it: with one proxy more, addresses are shared out again, and not with each failure.
const PREFERENCE: Duration = Duration::from_secs(30);

/// So long, whoever made a claim that others tell of has to say so itself.
const UNKNOWN: Duration = Duration::from_millis(100);

/// What is found out about another proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It was not asked yet.
    Unknown,
    /// It forwards, and its daemon is there.
    Up,
    /// The same, but it was down a short time ago.
    Shaky,
    /// It forwards, but its daemon is not there: it keeps what it owns, and claims nothing.
    Orphaned,
    /// It does not forward.
    Down,
}

/// How this proxy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It knows what the others say.
    Settled,
    /// It does not yet.
    Settling,
    /// It reaches nobody: others own what it owned.
    Isolated,
}

/// What a proxy says of one VPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Of the last claim that it knows of; 0: it knows of none.
    pub sequence: u32,
    /// Whether that is its own, and it answers for the addresses.
    pub is_owner: bool,
    /// Whether it wants the addresses.
    pub is_willing: bool,
}

/// What becomes of this proxy in a VPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// It owns the addresses.
    Take {
        /// The VPC.
        vni: u32,
        /// By the claim of this number.
        sequence: u32,
    },
    /// It does not any more.
    Leave {
        /// The VPC.
        vni: u32,
    },
}

/// What this proxy knows of who owns what.
#[derive(Debug)]
pub struct Succession {
    own: Ip,
    networks: BTreeMap<u32, Network>,
    /// What others said last, also of VPCs that are not known here.
    others: BTreeMap<Ip, BTreeMap<u32, Statement>>,
}

#[derive(Debug)]
struct Network {
    /// The proxies that may own the addresses, the first one first.
    order: Vec<Ip>,
    /// The number of the last claim; 0: there was none.
    sequence: u32,
    /// Whose it is, as far as is known.
    owner: Option<Ip>,
    /// Since when it is the last one.
    since: Instant,
    is_willing: bool,
    /// Whether the data path answers for the addresses.
    holds: bool,
    /// Since when this proxy owns them and the first of the order could.
    preferred: Option<Instant>,
}

impl Network {
    /// Whether this proxy wants the addresses, and nobody else is to have them.
    fn wants(&self, now: Instant) -> bool {
        self.is_willing && self.preferred.is_none_or(|since| now < since + PREFERENCE)
    }

    /// Takes in a claim, of an owner that is perhaps not known.
    fn learn(&mut self, sequence: u32, owner: Option<Ip>, now: Instant) -> bool {
        let is_new = match sequence.wrapping_sub(self.sequence).cast_signed() {
            _ if sequence == 0 => false,
            _ if self.sequence == 0 => true,
            ..0 => false,
            0 => match (owner, self.owner) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(proxy), Some(known)) => {
                    Claim { sequence, proxy }.replaces(&Claim { sequence, proxy: known })
                }
            },
            1.. => true,
        };
        if is_new {
            (self.sequence, self.owner, self.since) = (sequence, owner, now);
        }
        is_new
    }

    /// Whether this proxy is to claim the addresses that it does not hold. `owns` is what a proxy said
    /// last, if it said anything.
    fn is_next(
        &self,
        own: Ip,
        now: Instant,
        health: impl Fn(Ip) -> Health,
        is_willing: impl Fn(Ip) -> bool,
        owns: impl Fn(Ip) -> Option<bool>,
    ) -> bool {
        let mut is_gone = true;
        match self.owner {
            // It was isolated.
            Some(owner) if owner == own => return true,
            Some(owner) if self.order.contains(&owner) => {
                is_gone = match health(owner) {
                    Health::Down => true,
                    // It may have left them when it reached nobody, and cannot say so any more.
                    Health::Orphaned => owns(owner) != Some(true),
                    Health::Unknown | Health::Up | Health::Shaky => false,
                };
                if !is_gone && is_willing(owner) {
                    return false;
                }
            }
            Some(_) => {}
            None if self.sequence != 0 => {
                if now < self.since + UNKNOWN {
                    return false;
                }
            }
            None => {
                let is_first = self.order.first() == Some(&own);
                let may_own = |proxy: &Ip| match health(*proxy) {
                    _ if *proxy == own => false,
                    Health::Unknown => true,
                    Health::Up | Health::Shaky => owns(*proxy).is_none(),
                    Health::Orphaned | Health::Down => false,
                };
                let is_there = |proxy: &Ip| health(*proxy) != Health::Down;
                let is_left = !is_first && self.order.first().is_some_and(is_there);
                let is_open = is_left || self.order.iter().any(may_own);
                if is_open && now < self.since + PATIENCE {
                    return false;
                }
            }
        }
        let is_able = |proxy: Ip, is_steady: bool, is_wanted: bool| match health(proxy) {
            _ if proxy == own => self.is_willing || !is_wanted,
            Health::Up => is_willing(proxy) || !is_wanted,
            Health::Shaky => !is_steady && (is_willing(proxy) || !is_wanted),
            Health::Unknown | Health::Orphaned | Health::Down => false,
        };
        let next = |is_steady, is_wanted| {
            self.order.iter().find(|proxy| is_able(**proxy, is_steady, is_wanted))
        };
        let next_of_willing = next(true, true).or_else(|| next(false, true));
        // Somebody has to own what nobody does, or who comes to the VPC later finds nobody.
        let next = next_of_willing.or_else(|| next(false, false).filter(|_| is_gone));
        next == Some(&own)
    }

    /// Settles whether the first of the order could own what this proxy does.
    fn prefer(
        &mut self,
        own: Ip,
        now: Instant,
        health: impl Fn(Ip) -> Health,
        is_willing: impl Fn(Ip) -> bool,
    ) {
        let first = self.order.first().copied().filter(|first| *first != own);
        let could = first.is_some_and(|first| health(first) == Health::Up && is_willing(first));
        if self.holds && could {
            self.preferred.get_or_insert(now);
        } else {
            self.preferred = None;
        }
    }
}

impl Succession {
    /// Nothing, for the proxy of this underlay address.
    pub fn new(own: Ip) -> Self {
        Self { own, networks: BTreeMap::new(), others: BTreeMap::new() }
    }

    /// Which proxies may own a VPC's addresses, the first one first; and the claim by which this one
    /// does, if the VPC is not known yet.
    pub fn apply(&mut self, vni: u32, order: Vec<Ip>, claim: Option<u32>, now: Instant) {
        let own = self.own;
        let network = self.networks.entry(vni).or_insert_with(|| Network {
            order: Vec::new(),
            // A former version's claim has no number.
            sequence: claim.map_or(0, |sequence| sequence.max(1)),
            owner: claim.map(|_| own),
            since: now,
            is_willing: true,
            holds: claim.is_some(),
            preferred: None,
        });
        network.order = order;
        for (proxy, said) in &self.others {
            if let Some(Statement { sequence, is_owner, .. }) = said.get(&vni) {
                network.learn(*sequence, is_owner.then_some(*proxy), now);
            }
        }
    }

    /// Forgets a VPC. Whether it was known.
    pub fn remove(&mut self, vni: u32) -> bool {
        self.networks.remove(&vni).is_some()
    }

    /// Whether this proxy wants a VPC's addresses. Whether that is something new.
    pub fn set_willing(&mut self, vni: u32, is_willing: bool) -> bool {
        self.networks.get_mut(&vni).is_some_and(|network| {
            std::mem::replace(&mut network.is_willing, is_willing) != is_willing
        })
    }

    /// The claim by which this proxy owns a VPC's addresses now.
    pub fn claim(&self, vni: u32) -> Option<u32> {
        let network = self.networks.get(&vni).filter(|network| network.holds)?;
        Some(network.sequence)
    }

    /// The VPCs whose addresses this proxy owns now.
    pub fn held(&self) -> impl Iterator<Item = u32> {
        self.networks.iter().filter(|(_, network)| network.holds).map(|(vni, _)| *vni)
    }

    /// The other proxies that may own any addresses.
    pub fn others(&self) -> BTreeSet<Ip> {
        let all = self.networks.values().flat_map(|network| &network.order);
        all.copied().filter(|proxy| *proxy != self.own).collect()
    }

    /// What this proxy says, by VNI.
    pub fn statements(&self, now: Instant) -> impl Iterator<Item = (u32, Statement)> {
        self.networks.iter().map(move |(vni, network)| {
            let Network { sequence, owner, .. } = *network;
            let is_owner = network.holds && owner == Some(self.own);
            let is_willing = network.wants(now);
            (*vni, Statement { sequence, is_owner, is_willing })
        })
    }

    /// What another proxy says. Whether that is something new.
    pub fn hear(&mut self, proxy: Ip, vni: u32, statement: Statement, now: Instant) -> bool {
        let Statement { sequence, is_owner, is_willing } = statement;
        let before = self.others.entry(proxy).or_default().insert(vni, statement);
        let was_willing = before.map(|before| before.is_willing);
        let owner = is_owner.then_some(proxy);
        let learn = |network: &mut Network| network.learn(sequence, owner, now);
        self.networks.get_mut(&vni).is_some_and(learn) || was_willing != Some(is_willing)
    }

    /// A host knows of a later claim, whoever made it: it may be gone without this proxy having heard
    /// of it. Whether that is something new.
    pub fn outbid(&mut self, vni: u32, sequence: u32, now: Instant) -> bool {
        let learn = |network: &mut Network| network.learn(sequence, None, now);
        self.networks.get_mut(&vni).is_some_and(learn)
    }

    /// Forgets what others said: what is true now, they say again.
    pub fn forget_others(&mut self) {
        self.others.clear();
    }

    /// Forgets what others said but these.
    pub fn retain(&mut self, is_other: impl Fn(Ip) -> bool) {
        self.others.retain(|proxy, _| is_other(*proxy));
    }

    /// Whether a proxy said anything yet.
    pub fn has_heard(&self, proxy: Ip) -> bool {
        self.others.contains_key(&proxy)
    }

    /// What is to be done now, in the seconds `unix` since 1970, given how the others are.
    pub fn decide(
        &mut self,
        (now, unix): (Instant, u32),
        standing: Standing,
        health: impl Fn(Ip) -> Health,
    ) -> Vec<Move> {
        let (own, others) = (self.own, &self.others);
        let mut moves = Vec::new();
        for (&vni, network) in &mut self.networks {
            let is_owner = network.owner == Some(own);
            if network.holds && (!is_owner || standing == Standing::Isolated) {
                network.holds = false;
                moves.push(Move::Leave { vni });
            }
            let is_able = standing == Standing::Settled && !network.holds;
            let said = |proxy| others.get(&proxy).and_then(|said| said.get(&vni));
            let is_willing = |proxy| said(proxy).is_some_and(|said| said.is_willing);
            let owns = |proxy| {
                let has_spoken = others.contains_key(&proxy);
                has_spoken.then(|| said(proxy).is_some_and(|said| said.is_owner))
            };
            network.prefer(own, now, &health, is_willing);
            if is_able && network.is_next(own, now, &health, is_willing, owns) {
                let sequence = network.sequence.wrapping_add(1).max(unix).max(1);
                network.learn(sequence, Some(own), now);
                network.holds = true;
                moves.push(Move::Take { vni, sequence });
            }
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const VNI: u32 = 7;

    fn ip(last: u8) -> Ip {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    /// Proxies 1 to 3 of one VPC, that tell each other everything they can.
    struct World {
        now: Instant,
        unix: u32,
        proxies: Vec<Succession>,
        /// Whether a proxy is cut off, and whether its daemon is paused.
        cut: [bool; 3],
        paused: [bool; 3],
        /// Whether it was cut off or paused a turn ago.
        settling: [bool; 3],
        /// What a host knows.
        host: Option<Claim>,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let order = vec![ip(1), ip(2), ip(3)];
            let proxy = |last| {
                let mut proxy = Succession::new(ip(last));
                proxy.apply(VNI, order.clone(), None, now);
                proxy
            };
            let proxies = (1..=3).map(proxy).collect();
            Self {
                now,
                unix: 1000,
                proxies,
                cut: [false; 3],
                paused: [false; 3],
                settling: [false; 3],
                host: None,
            }
        }

        fn turn(&mut self) -> Vec<(u8, Move)> {
            self.now += Duration::from_millis(600);
            let mut moves = Vec::new();
            for index in 0..3 {
                if self.paused[index] {
                    self.settling[index] = true;
                    continue;
                }
                let cut = self.cut;
                let paused = self.paused;
                let health = |proxy: Ip| {
                    let other = (1..=3).position(|last| ip(last) == proxy).unwrap();
                    match (cut[index] || cut[other], paused[other]) {
                        (true, _) => Health::Down,
                        (false, true) => Health::Orphaned,
                        (false, false) => Health::Up,
                    }
                };
                let was_away = std::mem::replace(&mut self.settling[index], cut[index]);
                if cut[index] || was_away {
                    self.proxies[index].forget_others();
                }
                let standing = match (cut[index], was_away) {
                    (true, _) => Standing::Isolated,
                    (false, true) => Standing::Settling,
                    (false, false) => Standing::Settled,
                };
                let decided = self.proxies[index].decide((self.now, self.unix), standing, health);
                moves.extend(decided.into_iter().map(|it| (index as u8 + 1, it)));
                if let Some(sequence) = self.proxies[index].claim(VNI)
                    && !self.cut[index]
                {
                    let claim = Claim { sequence, proxy: ip(index as u8 + 1) };
                    match self.host {
                        Some(known) if known.replaces(&claim) => {
                            self.proxies[index].outbid(VNI, known.sequence, self.now);
                        }
                        _ => self.host = Some(claim),
                    }
                }
                let said: Vec<_> = self.proxies[index].statements(self.now).collect();
                for other in (0..3).filter(|other| !self.cut[*other] && !self.cut[index]) {
                    for (vni, statement) in &said {
                        let now = self.now;
                        self.proxies[other].hear(ip(index as u8 + 1), *vni, *statement, now);
                    }
                }
            }
            moves
        }

        fn turns(&mut self, count: usize) {
            for _ in 0..count {
                self.turn();
            }
        }

        /// Those whose data paths answer.
        fn owners(&self) -> Vec<u8> {
            (1..=3).filter(|last| self.proxies[*last as usize - 1].claim(VNI).is_some()).collect()
        }
    }

    #[test]
    fn the_first_begins_and_the_next_takes_over() {
        let mut world = World::new();
        assert_eq!(world.turn(), [], "another one may own them");
        assert_eq!(world.turn(), [(1, Move::Take { vni: VNI, sequence: 1000 })]);
        assert_eq!(world.turn(), []);
        world.cut[0] = true;
        let moves = world.turn();
        assert_eq!(
            moves,
            [(1, Move::Leave { vni: VNI }), (2, Move::Take { vni: VNI, sequence: 1001 })]
        );
        world.cut[0] = false;
        world.turns(3);
        assert_eq!(world.owners(), [2], "who comes back claims nothing");
    }

    #[test]
    fn who_is_without_a_daemon_keeps_what_it_owns_and_gets_nothing() {
        let mut world = World::new();
        world.turns(2);
        world.paused = [true, true, false];
        world.turns(3);
        assert_eq!(world.owners(), [1]);
        world.cut[0] = true;
        world.turns(3);
        assert_eq!(world.owners(), [1, 3], "the first is paused, and does not know");
        (world.paused, world.cut) = ([false; 3], [false; 3]);
        world.turns(2);
        assert_eq!(world.owners(), [3]);
    }

    #[test]
    fn an_owner_that_is_not_wanted_or_unwilling_is_replaced() {
        let mut world = World::new();
        world.turns(2);
        assert!(world.proxies[0].set_willing(VNI, false));
        world.turns(2);
        assert_eq!(world.owners(), [2]);
        for proxy in &mut world.proxies {
            proxy.apply(VNI, vec![ip(3), ip(1)], None, world.now);
        }
        world.turns(2);
        assert_eq!(world.owners(), [3], "the order is without the second now");
    }

    #[test]
    fn the_first_gets_its_addresses_back_when_it_is_well_for_a_while() {
        let mut world = World::new();
        world.turns(2);
        world.cut[0] = true;
        world.turns(2);
        assert_eq!(world.owners(), [2]);
        world.cut[0] = false;
        let mut moves = Vec::new();
        let back = world.now;
        while moves.is_empty() {
            moves = world.turn();
        }
        let first = Move::Take { vni: VNI, sequence: 1002 };
        assert_eq!(moves, [(1, first), (2, Move::Leave { vni: VNI })]);
        assert!(world.now - back >= PREFERENCE);
        world.turns(200);
        assert_eq!(world.owners(), [1]);
    }

    #[test]
    fn who_reaches_nobody_in_the_vpc_owns_it_only_if_nobody_else_can() {
        let mut world = World::new();
        world.turns(2);
        for proxy in &mut world.proxies {
            proxy.set_willing(VNI, false);
        }
        world.turns(3);
        assert_eq!(world.owners(), [1], "no other is better");
        world.cut[0] = true;
        world.turns(3);
        assert_eq!(world.owners(), [2], "somebody has to");
        world.proxies[2].set_willing(VNI, true);
        world.turns(3);
        assert_eq!(world.owners(), [3]);
    }

    #[test]
    fn the_last_one_serves_whatever_became_of_the_others() {
        let mut world = World::new();
        world.turns(2);
        let mut last = world.proxies.pop().unwrap();
        let now = (world.now, world.unix);
        let moves = last.decide(now, Standing::Settled, |_| Health::Down);
        assert_eq!(moves, [Move::Take { vni: VNI, sequence: 1001 }]);
    }

    #[test]
    fn who_begins_anew_claims_nothing_that_another_owns() {
        let (mut new, now) = (Succession::new(ip(1)), Instant::now());
        let statement = Statement { sequence: 3000, is_owner: true, is_willing: true };
        new.hear(ip(2), VNI, statement, now);
        new.apply(VNI, vec![ip(1), ip(2)], None, now);
        let now = (now + PATIENCE * 2, 4000);
        assert_eq!(new.decide(now, Standing::Settled, |_| Health::Up), []);
    }

    #[test]
    fn who_left_its_addresses_and_lost_its_daemon_is_replaced() {
        let (mut proxy, now) = (Succession::new(ip(2)), Instant::now());
        proxy.apply(VNI, vec![ip(1), ip(2)], None, now);
        let mut hear = |is_owner| {
            let said = Statement { sequence: 3000, is_owner, is_willing: true };
            proxy.hear(ip(1), VNI, said, now);
            proxy.decide((now, 4000), Standing::Settled, |_| Health::Orphaned)
        };
        assert_eq!(hear(true), [], "its data path goes on");
        assert_eq!(hear(false), [Move::Take { vni: VNI, sequence: 4000 }]);
    }

    #[test]
    fn numbers_beyond_2038_are_claims() {
        let mut proxy = Succession::new(ip(1));
        let now = Instant::now();
        proxy.apply(VNI, vec![ip(1)], None, now);
        let unix = 1 << 31;
        let moves = proxy.decide((now, unix), Standing::Settled, |_| Health::Down);
        assert_eq!(moves, [Move::Take { vni: VNI, sequence: unix }]);
        assert_eq!(proxy.claim(VNI), Some(unix));
    }

    #[test]
    fn who_was_isolated_and_finds_no_other_owner_takes_its_own_again() {
        let mut proxy = Succession::new(ip(1));
        let now = Instant::now();
        proxy.apply(VNI, vec![ip(1), ip(2)], Some(0), now);
        let mut decide = |standing| proxy.decide((now, 5), standing, |_| Health::Down);
        assert_eq!(decide(Standing::Settled), []);
        assert_eq!(decide(Standing::Isolated), [Move::Leave { vni: VNI }]);
        assert_eq!(decide(Standing::Settling), []);
        assert_eq!(decide(Standing::Settled), [Move::Take { vni: VNI, sequence: 5 }]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn for_an_hour_without_anybody_else_addresses_are_somebody_s(
            steps in prop::collection::vec((0..3usize, any::<bool>(), any::<bool>()), 600),
        ) {
            let mut world = World::new();
            let begin = world.now;
            for (index, cut, paused) in steps {
                world.unix += 6;
                (world.cut[index], world.paused[index]) = (cut, paused);
                world.turns(10);
                let is_there = |index: &usize| !world.cut[*index];
                let is_well = |index: &usize| is_there(index) && !world.paused[*index];
                let owners = || world.owners().into_iter().map(|last| usize::from(last) - 1);
                // One whose daemon is paused goes on with what it owned, and may not know better.
                prop_assert!(owners().filter(is_well).count() <= 1);
                let is_owned = owners().any(|index| is_there(&index));
                prop_assert!(is_owned || !(0..3).any(|index| is_well(&index)));
            }
            prop_assert!(world.now - begin >= Duration::from_hours(1));
        }
    }

    proptest! {
        #[test]
        fn in_the_end_one_that_can_owns_the_addresses(
            steps in prop::collection::vec((0..3usize, any::<bool>(), any::<bool>()), 0..40),
        ) {
            let mut world = World::new();
            for (index, cut, paused) in steps {
                world.unix += 1;
                (world.cut[index], world.paused[index]) = (cut, paused);
                world.turn();
            }
            world.paused = [false; 3];
            world.turns(5);
            let owners = world.owners();
            if world.cut == [true; 3] {
                prop_assert!(owners.is_empty());
                return Ok(());
            }
            prop_assert_eq!(owners.len(), 1);
            prop_assert!(!world.cut[owners[0] as usize - 1]);
            prop_assert_eq!(world.host.map(|claim| claim.proxy), Some(ip(owners[0])));
            world.cut = [false; 3];
            world.turns(3);
            prop_assert_eq!(world.owners(), owners, "nothing moves without need");
        }
    }
}
