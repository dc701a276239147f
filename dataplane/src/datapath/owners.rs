//! The proxies of VPCs, and which one owns the shared address of each: as proxies claim it, which
//! programs take in.

use std::collections::{BTreeSet, HashMap};

use warren_abi::maps::{Claim, Member, names};
use warren_abi::wire::Ip;

use super::Error;
use super::changes::{Changes, Table};
use super::programs::{MapSpec, Programs};

/// Proxies of a VPC, most of the time.
const PROXIES: u32 = 8;

/// The maps for so many VPCs.
pub(super) fn map_specs(vpcs: u32) -> [MapSpec; 2] {
    [
        MapSpec::new::<Member, u32>(names::MEMBERS, vpcs * PROXIES),
        MapSpec::new::<u32, Claim>(names::CLAIMS, vpcs),
    ]
}

/// The proxies of all VPCs.
pub(super) struct Owners {
    members: Table<Member, u32>,
    claims: Table<u32, Claim>,
    /// What is in `members`, by VNI.
    known: HashMap<u32, BTreeSet<Ip>>,
}

impl Owners {
    pub fn open(programs: &mut Programs, changes: &Changes) -> Result<Self, Error> {
        let members: Table<Member, u32> = Table::open(programs, names::MEMBERS, changes)?;
        let claims = Table::open(programs, names::CLAIMS, changes)?;
        let mut known = HashMap::<_, BTreeSet<_>>::new();
        for key in members.keys() {
            let Member { vni, proxy } = key.map_err(|e| Error::map(names::MEMBERS, e))?;
            known.entry(vni).or_default().insert(proxy);
        }
        Ok(Self { members, claims, known })
    }

    /// The proxies of a VPC.
    pub fn proxies(&self, vni: u32) -> impl Iterator<Item = Ip> {
        self.known.get(&vni).into_iter().flatten().copied()
    }

    /// Who claimed a VPC's addresses last, if anyone did.
    pub fn owner(&self, vni: u32) -> Result<Option<Ip>, Error> {
        Ok(self.claims.find(&vni)?.map(|claim| claim.proxy))
    }

    /// Makes these the proxies of a VPC. Who is none any more owns nothing.
    pub fn set_proxies(&mut self, vni: u32, proxies: BTreeSet<Ip>) -> Result<(), Error> {
        let before = self.known.get(&vni).cloned().unwrap_or_default();
        for proxy in proxies.difference(&before) {
            self.members.insert(&Member { vni, proxy: *proxy }, &1)?;
        }
        for proxy in before.difference(&proxies) {
            self.members.remove(&Member { vni, proxy: *proxy })?;
        }
        // After that, no claim of theirs is taken in.
        if self.owner(vni)?.is_some_and(|owner| !proxies.contains(&owner)) {
            self.claims.remove(&vni)?;
        }
        if proxies.is_empty() {
            self.known.remove(&vni);
        } else {
            self.known.insert(vni, proxies);
        }
        Ok(())
    }
}
