//! What is known of VPCs: what is stored, and how far each of their shared addresses is deployed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::time::Instant;
use tonic::Status;
use warren_proto::route::Route;
use warren_proto::security::Security;
use warren_proto::v1::{self, ApplyVpcRequest};

use super::leases::place_of;
use crate::fleet::{Peer, Session};
use crate::plan::{self, Node, Plan, plan};
use crate::ports::Leases;
use crate::routes::ROUTES_PREFIX;
use crate::security::{SECURITY_PREFIX, Stored};
use crate::store::{Revision, StoreError, decode};
use crate::vpc::{LEASES_PREFIX, VPC_PREFIX, Vpc};

#[derive(Default)]
pub(super) struct State {
    pub networks: BTreeMap<String, Network>,
    /// Networks to plan again.
    pub dirty: BTreeSet<String>,
}

/// One VPC.
#[derive(Default)]
pub(super) struct Network {
    pub vpc: Option<Vpc>,
    routes: Vec<v1::Route>,
    pub security: Secured,
    /// Its shared addresses, by their places.
    pub addresses: BTreeMap<usize, Deployed>,
}

/// One shared address.
#[derive(Default)]
pub(super) struct Deployed {
    pub leases: Leases,
    pub agents: HashMap<String, Told>,
    pub plan: Plan,
}

/// The security of a VPC.
#[derive(Default)]
pub(super) struct Secured {
    pub security: Security,
    /// None was ever stored, if there is none.
    message: Option<v1::VpcSecurity>,
    /// When it was stored.
    revision: Revision,
}

/// What one agent was told of one shared address.
#[derive(Default)]
pub(super) struct Told {
    pub acknowledged: Option<(Session, ApplyVpcRequest)>,
    /// A push is under way. One at a time: so they arrive in order.
    pub busy: bool,
    pub failure: Option<(Status, Instant)>,
}

impl State {
    /// Takes in a key of the store.
    pub fn take_in(
        &mut self,
        key: &str,
        value: Option<&[u8]>,
        revision: Revision,
    ) -> Result<(), StoreError> {
        let name = if let Some(name) = key.strip_prefix(VPC_PREFIX) {
            self.network(name).vpc = value.map(|value| decode(key, value)).transpose()?;
            name
        } else if let Some((name, place)) = key.strip_prefix(LEASES_PREFIX).and_then(place_of) {
            let leases = value.map(|value| decode(key, value)).transpose()?;
            let addresses = &mut self.network(name).addresses;
            addresses.entry(place).or_default().leases = leases.unwrap_or_default();
            name
        } else if let Some(name) = key.strip_prefix(ROUTES_PREFIX) {
            let routes: Option<Vec<Route>> = value.map(|value| decode(key, value)).transpose()?;
            self.network(name).routes = routes.into_iter().flatten().map(Into::into).collect();
            name
        } else if let Some(name) = key.strip_prefix(SECURITY_PREFIX) {
            let stored: Option<Stored> = value.map(|value| decode(key, value)).transpose()?;
            let network = self.network(name);
            // It may have been taken in before the event came.
            if revision <= network.security.revision {
                return Ok(());
            }
            let security = stored.unwrap_or_default().security;
            let message = Some((&security).into());
            network.security = Secured { security, message, revision };
            network.addresses.values_mut().for_each(|deployed| deployed.plan.ready.clear());
            name
        } else {
            return Ok(());
        };
        self.dirty.insert(name.to_owned());
        Ok(())
    }

    fn network(&mut self, name: &str) -> &mut Network {
        self.networks.entry(name.to_owned()).or_default()
    }
}

impl Network {
    pub fn is_ready(&self, host: &str, session: Session) -> bool {
        self.addresses.values().any(|it| it.plan.ready.get(host) == Some(&session))
    }

    /// How many ports of all its addresses a host was told of.
    pub fn ports_of(&self, host: &str) -> u32 {
        let told = self.addresses.values().filter_map(|it| it.agents.get(host));
        let ports = told.filter_map(|told| plan::ports(&told.acknowledged.as_ref()?.1));
        ports.map(|ports| ports.count).sum()
    }

    /// Those of its addresses of which a host has ports.
    pub fn leased_to(&self, host: &str) -> impl Iterator<Item = &Deployed> {
        self.addresses.values().filter(move |it| it.leases.of(host).is_some())
    }

    pub fn plan(&mut self, peers: &BTreeMap<String, Peer>, settled: bool) {
        let Some(vpc) = &self.vpc else {
            self.addresses.values_mut().for_each(|it| it.plan = Plan::default());
            return;
        };
        for place in 0..vpc.shared_addresses().count() {
            let deployed = self.addresses.entry(place).or_default();
            let node = |(name, peer): (&String, &Peer)| (name.clone(), deployed.node(name, peer));
            let nodes = peers.iter().map(node).collect();
            let security = self.security.message.as_ref();
            let mut plan = plan(vpc, place, &self.routes, security, &deployed.leases, &nodes);
            if !settled {
                // Proxies that serve may be about to register again: nothing moves from them.
                plan.pushes.clear();
                plan.ready.clear();
            }
            deployed.plan = plan;
        }
    }
}

impl Deployed {
    fn node(&self, name: &str, peer: &Peer) -> Node<'_> {
        let session = peer.open.as_ref().map(|(session, _)| *session);
        let told = self.agents.get(name).and_then(|told| told.acknowledged.as_ref());
        Node {
            role: peer.role,
            underlay_address: peer.underlay_address,
            session,
            drained: peer.drained,
            acknowledged: told
                .filter(|(acknowledged_in, _)| Some(*acknowledged_in) == session)
                .map(|(_, request)| request),
        }
    }
}
