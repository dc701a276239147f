//! Policies of a host's slots: rules in their places, and how often each decided.
//!
//! What is at a place never changes: other rules take another place, slots go over to it one by
//! one, and the former one is used again when all others have been. So no packet ever meets half
//! of a change.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

use aya::maps::{Array, MapData, PerCpuArray, PerCpuValues};
use ipnetwork::IpNetwork;
use warren_abi::maps::{self, Guard, Rule, names};
use warren_abi::policy::MAX_RULES;
use warren_abi::wire::{ICMP, TCP, UDP};
use warren_proto::policy::{Action, Protocol, Rule as Definition};

use super::programs::{MapSpec, Programs};
use super::{Error, check_vni};

/// Counters of rules: 8 bytes a CPU each.
const MAX_COUNTERS: u32 = 1 << 15;
/// Under this number, what no rule is about is counted.
pub const OTHERWISE: u32 = 0;

/// Which flows slots may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The VPC that the rules' numbers are of.
    pub vni: u32,
    /// At most 128, each with its number, which is not [`OTHERWISE`]; in any order.
    pub rules: Vec<(u32, Definition)>,
    /// What becomes of flows that no rule is about.
    pub otherwise: Action,
}

/// A policy that slots can be guarded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PolicyId {
    place: u16,
    epoch: u32,
}

impl PolicyId {
    /// Where it is.
    pub(super) fn place(self) -> u16 {
        self.place
    }

    /// Its epoch.
    pub(super) fn epoch(self) -> u32 {
        self.epoch
    }
}

/// The maps of policies.
pub(super) fn map_specs() -> [MapSpec; 2] {
    [
        MapSpec::new::<u32, maps::Policy>(names::POLICIES, Guard::MAX_POLICIES + 1),
        MapSpec::new::<u32, u64>(names::RULE_HITS, MAX_COUNTERS),
    ]
}

/// What a counter is of: VPC and number of the rule.
type Counted = (u32, u32);

/// The policies of a host. This process is the only one to write them.
pub(super) struct Policies {
    map: Array<MapData, maps::Policy>,
    hits: PerCpuArray<MapData, u64>,
    /// By place; boxed, for most are not there.
    present: HashMap<u16, Box<maps::Policy>>,
    /// Places, the one that has been free longest first.
    free: VecDeque<u16>,
    /// Each counter, and how many policies have it.
    counters: HashMap<Counted, (u32, u32)>,
    free_counters: VecDeque<u32>,
    /// That of the newest policy. Kept at the place 0 as well, where it outlives this process.
    epoch: u32,
}

impl Policies {
    /// Adopts what is there.
    pub fn open(programs: &mut Programs) -> Result<Self, Error> {
        let map: Array<MapData, maps::Policy> = programs.map(names::POLICIES)?;
        let hits = programs.map(names::RULE_HITS)?;
        let epoch = map.get(&0, 0).map_err(error)?.epoch;
        let mut policies = Self {
            map,
            hits,
            present: HashMap::new(),
            free: VecDeque::new(),
            counters: HashMap::new(),
            free_counters: VecDeque::new(),
            epoch,
        };
        for place in 1..=Guard::MAX_POLICIES as u16 {
            let policy = policies.map.get(&place.into(), 0).map_err(error)?;
            if policy.epoch == 0 {
                policies.free.push_back(place);
                continue;
            }
            for (counted, counter) in counters(&policy) {
                policies.counters.entry(counted).or_insert((counter, 0)).1 += 1;
            }
            policies.present.insert(place, Box::new(policy));
        }
        let mut used = vec![false; MAX_COUNTERS as usize];
        for &(counter, _) in policies.counters.values() {
            if let Some(used) = used.get_mut(counter as usize) {
                *used = true;
            }
        }
        policies.free_counters =
            (0..MAX_COUNTERS).filter(|&counter| !used[counter as usize]).collect();
        Ok(policies)
    }

    /// Puts a policy at a place of its own.
    pub fn add(&mut self, policy: &Policy) -> Result<PolicyId, Error> {
        check_vni(policy.vni)?;
        let mut rules = policy.rules.clone();
        rules.sort_by_key(|(id, rule)| (rule.rank(), *id));
        if rules.len() > MAX_RULES {
            let remedy = "join some, or give the instance fewer groups: at most 128";
            return Err(Error::invalid("number of rules", rules.len(), remedy));
        }
        if rules.iter().any(|(id, _)| *id == OTHERWISE) {
            return Err(Error::invalid("number of a rule", OTHERWISE, "give one from 1"));
        }
        let Some(place) = self.free.pop_front() else {
            let remedy = "at most so many combinations of security groups fit a host: use fewer";
            return Err(Error::invalid("number of policies", self.present.len(), remedy));
        };
        let written = self.write(place, policy, &rules);
        if written.is_err() {
            self.free.push_front(place);
        }
        written
    }

    fn write(
        &mut self,
        place: u16,
        policy: &Policy,
        rules: &[(u32, Definition)],
    ) -> Result<PolicyId, Error> {
        let mut epoch = self.epoch.wrapping_add(1);
        if epoch == 0 {
            epoch = 1;
        }
        let mut value = maps::Policy { epoch, ..maps::Policy::NONE };
        // Never again, whatever becomes of this one: flows may have been judged under it.
        self.map.set(0, value, 0).map_err(error)?;
        self.epoch = epoch;

        value.vni = policy.vni;
        value.count = rules.len() as u32;
        value.otherwise = action(policy.otherwise).into();
        value.counter = self.counter_of((policy.vni, OTHERWISE))?;
        for (to, &(id, rule)) in value.rules.iter_mut().zip(rules) {
            *to = entry(&rule, id, self.counter_of((policy.vni, id))?);
        }
        self.map.set(place.into(), value, 0).map_err(error)?;
        for (counted, counter) in counters(&value) {
            self.counters.entry(counted).or_insert((counter, 0)).1 += 1;
        }
        self.present.insert(place, Box::new(value));
        Ok(PolicyId { place, epoch })
    }

    /// The counter for a rule: the one that it has, or one at zero.
    fn counter_of(&mut self, rule: Counted) -> Result<u32, Error> {
        if let Some(&(counter, _)) = self.counters.get(&rule) {
            return Ok(counter);
        }
        let Some(counter) = self.free_counters.pop_front() else {
            let remedy = "so many rules fit a host: use fewer";
            return Err(Error::invalid("number of rules", MAX_COUNTERS, remedy));
        };
        let cpus = aya::util::nr_cpus()
            .map_err(|(path, source)| Error::system("count CPUs by", path, source))?;
        let error = |source| Error::map(names::RULE_HITS, source);
        let zeroes = PerCpuValues::try_from(vec![0; cpus]).map_err(|e| error(e.into()))?;
        self.hits.set(counter, zeroes, 0).map_err(error)?;
        // In use when a policy is there that has it.
        self.counters.insert(rule, (counter, 0));
        Ok(counter)
    }

    /// Whether it is there.
    pub fn contains(&self, id: PolicyId) -> bool {
        self.present.get(&id.place).is_some_and(|policy| policy.epoch == id.epoch)
    }

    /// Removes the policies that are not to be kept.
    pub fn retain(&mut self, keep: impl Fn(PolicyId) -> bool) -> Result<(), Error> {
        let ids =
            self.present.iter().map(|(&place, policy)| PolicyId { place, epoch: policy.epoch });
        let mut unwanted: Vec<_> = ids.filter(|&id| !keep(id)).collect();
        unwanted.sort_by_key(|id| id.epoch);
        for PolicyId { place, .. } in unwanted {
            self.map.set(place.into(), maps::Policy::NONE, 0).map_err(error)?;
            let Some(policy) = self.present.remove(&place) else { continue };
            self.free.push_back(place);
            for (counted, _) in counters(&policy) {
                if let Some((_, uses)) = self.counters.get_mut(&counted) {
                    *uses -= 1;
                }
            }
        }
        let free = &mut self.free_counters;
        self.counters.retain(|_, &mut (counter, uses)| {
            if uses == 0 {
                free.push_back(counter);
            }
            uses > 0
        });
        Ok(())
    }

    /// How often each rule of a VPC decided.
    pub fn hits(&self, vni: u32) -> Result<BTreeMap<u32, u64>, Error> {
        let of_vpc = self.counters.iter().filter(|((of, _), _)| *of == vni);
        of_vpc
            .map(|(&(_, id), &(counter, _))| {
                let values = self.hits.get(&counter, 0);
                let values = values.map_err(|source| Error::map(names::RULE_HITS, source))?;
                Ok((id, values.iter().sum()))
            })
            .collect()
    }
}

fn error(source: aya::maps::MapError) -> Error {
    Error::map(names::POLICIES, source)
}

/// The counters of a policy, each once.
fn counters(policy: &maps::Policy) -> BTreeMap<Counted, u32> {
    let rules = policy.rules.iter().take(policy.count as usize);
    let rules = rules.map(|rule| ((policy.vni, rule.id), rule.counter));
    rules.chain([((policy.vni, OTHERWISE), policy.counter)]).collect()
}

fn action(action: Action) -> u16 {
    match action {
        Action::Allow => Rule::ALLOW,
        Action::Deny => Rule::DENY,
    }
}

/// A rule as the programs read it.
fn entry(rule: &Definition, id: u32, counter: u32) -> Rule {
    let (first_port, last_port) = rule.ports().unwrap_or((0, u16::MAX));
    let (family, network, length) = match rule.peers() {
        None => (Rule::ANY, IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
        Some(IpNetwork::V4(peers)) => (4, peers.network().into(), peers.prefix() + 96),
        Some(IpNetwork::V6(peers)) => (6, peers.network().into(), peers.prefix()),
    };
    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    Rule {
        network: network.into(),
        mask: Ipv6Addr::from_bits(mask).into(),
        first_port,
        last_port,
        protocol: match rule.protocol() {
            Protocol::Any => Rule::ANY,
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
            Protocol::Icmp => ICMP,
        },
        family,
        action: action(rule.action()),
        id,
        counter,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule() -> impl Strategy<Value = Definition> {
        let protocol =
            prop::sample::select(vec!["any", "tcp 50-80", "udp", "tcp", "icmp", "udp 7"]);
        let peers = prop::sample::select(vec![
            "",
            "to 10.0.0.0/8",
            "to 10.1.0.0/16",
            "to 10.1.2.3/32",
            "to 0.0.0.0/0",
            "to ::/0",
            "to fd00::/8",
            "to fd00::1/128",
        ]);
        (1u16..4, any::<bool>(), protocol, peers).prop_map(|(priority, deny, protocol, peers)| {
            let action = if deny { "deny" } else { "allow" };
            format!("{priority} {action} {protocol} {peers}").parse().expect("it is a rule")
        })
    }

    /// All that speaks of a flow, of the rules with the lowest priority, of which a denial wins.
    fn model(rules: &[Definition], peer: IpAddr, port: u16, protocol: Protocol) -> Option<Action> {
        let about = rules.iter().filter(|rule| rule.is_about(peer, port, protocol));
        let lowest = about.clone().map(Definition::priority).min()?;
        let mut foremost = about.filter(|rule| rule.priority() == lowest);
        let is_denied = foremost.any(|rule| rule.action() == Action::Deny);
        Some(if is_denied { Action::Deny } else { Action::Allow })
    }

    proptest! {
        #[test]
        fn programs_decide_as_the_rules_say(
            rules in prop::collection::vec(rule(), 0..20),
            peer in prop::sample::select(vec!["10.1.2.3", "10.1.9.9", "10.9.9.9", "9.9.9.9", "fd00::1", "fd00::2", "2001:db8::1"]),
            port in prop::sample::select(vec![7u16, 49, 50, 65, 80, 81]),
            (number, protocol) in prop::sample::select(vec![(TCP, Protocol::Tcp), (UDP, Protocol::Udp), (ICMP, Protocol::Icmp), (58, Protocol::Icmp)]),
            otherwise in prop::sample::select(vec![Action::Allow, Action::Deny]),
        ) {
            let peer: IpAddr = peer.parse().unwrap();
            let port = if protocol == Protocol::Icmp { 0 } else { port };
            let mut sorted = rules.clone();
            sorted.sort_by_key(Definition::rank);
            let mut policy = maps::Policy {
                epoch: 1,
                vni: 1,
                count: sorted.len() as u32,
                otherwise: action(otherwise).into(),
                counter: 100,
                ..maps::Policy::NONE
            };
            for (index, rule) in sorted.iter().enumerate() {
                policy.rules[index] = entry(rule, 1, index as u32);
            }
            let decision = policy.decide(&peer.into(), port, number);
            let wanted = model(&rules, peer, port, protocol);
            prop_assert_eq!(decision.is_allowed, wanted.unwrap_or(otherwise) == Action::Allow);
            let counted = sorted.get(decision.counter as usize);
            prop_assert_eq!(counted.is_none(), wanted.is_none());
            prop_assert!(counted.is_none_or(|rule| rule.is_about(peer, port, protocol)));
        }
    }
}
