//! Leases, as they are stored: who gets ports of which of a VPC's shared addresses.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{DeployError, Deployer};
use crate::fleet::HostUse;
use crate::leasing::View;
use crate::ports::{Demand, Leases, needed, wanted};
use crate::spread;
use crate::store::{Precondition, StoreError, Write, decode};
use crate::vpc::{LEASES_PREFIX, VPC_PREFIX, Vpc, leases_key};

/// A start waits so long for more ports.
const ROOM_TIMEOUT: Duration = Duration::from_millis(250);

/// The VPC and the place of the address that a key's rest stands for.
pub(super) fn place_of(rest: &str) -> Option<(&str, usize)> {
    match rest.split_once('/') {
        None => Some((rest, 0)),
        Some((vpc, place)) => Some((vpc, place.parse().ok()?)),
    }
}

impl Deployer {
    /// Gets the host ports for one more instance, if it has too few. An instance starts on what
    /// there is if more does not come at once.
    pub(super) async fn make_room(&self, vpc: &str, host: &str) -> Result<(), DeployError> {
        let demand = Demand { in_use: 0, instances: self.fleet.instances_in(host, vpc) };
        let has_room = || {
            let state = self.lock();
            let network = state.networks.get(vpc);
            network.is_none_or(|network| network.ports_of(host) >= needed(demand.instances))
        };
        if has_room() {
            return Ok(());
        }
        let mut progress = self.progress.subscribe();
        let Some(definition) = self.definition(vpc) else { return Ok(()) };
        let first = definition.ports_per_host;
        for place in spread::of_host(&definition.vnis(), host) {
            let lease = |leases: &mut Leases| {
                let held = leases.of(host).map(|lease| lease.ports.count);
                let want = wanted(held, first, demand);
                if held.is_some_and(|held| want > held) {
                    // What there is not is told of when it is next looked for.
                    leases.lease(host, want).ok();
                }
            };
            if self.change_leases(&leases_key(vpc, place), lease).await? {
                break;
            }
        }
        let roomy = async { while !has_room() && progress.changed().await.is_ok() {} };
        tokio::time::timeout(ROOM_TIMEOUT, roomy).await.ok();
        Ok(())
    }

    /// Who holds which ports of each shared address, and what hosts use of them.
    pub fn leases(&self) -> Vec<View> {
        let uses = self.fleet.uses();
        let state = self.lock();
        let mut views = Vec::new();
        for (name, network) in &state.networks {
            let Some(vpc) = &network.vpc else { continue };
            let vnis = vpc.vnis();
            let is_there = |(_, used): &(&String, &HostUse)| used.instances_in(name) > 0;
            let first = |(host, _): (&String, _)| (host.clone(), spread::of_host(&vnis, host)[0]);
            let firsts: Vec<_> = uses.iter().filter(is_there).map(first).collect();
            for (place, shared) in vpc.shared_addresses().enumerate() {
                let Some(deployed) = network.addresses.get(&place) else { continue };
                let of_address =
                    |(host, used): (&String, &HostUse)| (host.clone(), used.of(name, &shared));
                let hosts = firsts.iter().filter(|(_, first)| *first == place);
                views.push(View {
                    vpc: name.clone(),
                    place,
                    first: vpc.ports_per_host,
                    leases: deployed.leases.clone(),
                    uses: uses.iter().map(of_address).collect(),
                    firsts: hosts.map(|(host, _)| host.clone()).collect(),
                    dropped: deployed.plan.dropped.clone(),
                });
            }
        }
        views
    }

    /// Stores leases of a shared address, unless they are other than `known` by now.
    pub async fn replace_leases(
        &self,
        (vpc, place): (&str, usize),
        known: &Leases,
        leases: &Leases,
    ) -> Result<(), StoreError> {
        let change = |stored: &mut Leases| {
            if stored == known {
                stored.clone_from(leases);
            }
        };
        self.change_leases(&leases_key(vpc, place), change).await.map(drop)
    }

    /// Takes from a host that is gone for good all ports of all VPCs: they are another's when each
    /// proxy has dropped them, and after a rest.
    pub async fn forget(&self, host: &str) -> Result<(), StoreError> {
        for entry in self.store.list(LEASES_PREFIX).await?.1 {
            let forget = |leases: &mut Leases| {
                leases.forget(host);
            };
            self.change_leases(&entry.key, forget).await?;
        }
        Ok(())
    }

    /// Leases the host ports of the first of the VPC's shared addresses that has some left, unless it
    /// has some of that one; of those at `but`, none.
    pub(super) async fn lease(
        &self,
        vpc: &str,
        host: &str,
        but: &BTreeSet<usize>,
    ) -> Result<(), DeployError> {
        loop {
            match self.try_lease(vpc, host, but).await {
                // The VPC or its leases were changed meanwhile.
                Err(DeployError::Store(StoreError::Conflict(_))) => {}
                done => return done,
            }
        }
    }

    async fn try_lease(
        &self,
        vpc: &str,
        host: &str,
        but: &BTreeSet<usize>,
    ) -> Result<(), DeployError> {
        let entry = self.store.get(&format!("{VPC_PREFIX}{vpc}")).await?;
        let entry = entry.ok_or_else(|| DeployError::UnknownVpc(vpc.to_owned()))?;
        let definition: Vpc = decode(&entry.key, &entry.value)?;
        if let Some(of) = definition.public_of {
            return Err(DeployError::IsPublic { vpc: vpc.to_owned(), of });
        }
        let lease = |leases: &mut Leases| {
            if leases.of(host).is_some() {
                return Ok(());
            }
            let count = wanted(None, definition.ports_per_host, Demand::default());
            let no_ports = |reason| DeployError::NoPorts {
                vpc: vpc.to_owned(),
                host: host.to_owned(),
                reason,
            };
            leases.lease(host, count).map(drop).map_err(no_ports)
        };
        let mut exhausted = None;
        for place in spread::of_host(&definition.vnis(), host) {
            if but.contains(&place) {
                continue;
            }
            let unchanged = Precondition::unchanged(&entry.key, Some(&entry));
            match self.try_change_leases(&leases_key(vpc, place), vec![unchanged], lease).await {
                Ok(_) => return Ok(()),
                Err(error @ DeployError::NoPorts { .. }) => exhausted = exhausted.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        exhausted.map_or(Ok(()), Err)
    }

    /// Leases the host ports of one more of the VPC's shared addresses, if there is one with any left.
    pub(crate) async fn spill(&self, vpc: &str, host: &str) -> Result<(), DeployError> {
        let held = {
            let state = self.lock();
            let addresses = state.networks.get(vpc).into_iter().flat_map(|it| &it.addresses);
            let held = addresses.filter(|(_, deployed)| deployed.leases.of(host).is_some());
            held.map(|(place, _)| *place).collect()
        };
        match self.lease(vpc, host, &held).await {
            Err(DeployError::NoPorts { .. }) => Ok(()),
            done => done,
        }
    }

    /// Changes leases as they are stored, under a key. Whether that changed anything.
    async fn change_leases(
        &self,
        key: &str,
        change: impl Fn(&mut Leases),
    ) -> Result<bool, StoreError> {
        loop {
            let changed = |leases: &mut Leases| {
                change(leases);
                Ok::<_, StoreError>(())
            };
            match self.try_change_leases(key, Vec::new(), changed).await {
                // They were changed meanwhile.
                Err(StoreError::Conflict(_)) => {}
                done => return done,
            }
        }
    }

    /// The same, which may fail, and does if anything was changed meanwhile.
    async fn try_change_leases<E: From<StoreError>>(
        &self,
        key: &str,
        mut preconditions: Vec<Precondition>,
        change: impl Fn(&mut Leases) -> Result<(), E>,
    ) -> Result<bool, E> {
        let entry = self.store.get(key).await?;
        let before: Leases = match &entry {
            Some(entry) => decode(key, &entry.value)?,
            None => Leases::default(),
        };
        let mut leases = before.clone();
        change(&mut leases)?;
        if leases == before {
            return Ok(false);
        }
        preconditions.push(Precondition::unchanged(key, entry.as_ref()));
        self.store.commit(preconditions, vec![Write::put(key, &leases)?]).await?;
        Ok(true)
    }
}
