//! What hosts and proxies dropped: asked of all of them at once, and told with names.

use std::collections::BTreeMap;
use std::time::Duration;

use warren_proto::v1;

use crate::ask::{Answer, Unknown, Whom, ask};
use crate::fleet::{Fleet, Role};
use crate::store::{Store, StoreError};
use crate::vpc::{self, Vpc};

/// An agent that did not answer by then is told of as one that does not.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why drops cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum DropsError {
    /// No host or proxy has this name.
    #[error(transparent)]
    Unknown(#[from] Unknown),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Asks all hosts and proxies, or the one that is `wanted`, unless that is empty. They come in the order of their names;
/// one that does not answer within 2 s comes with its problem.
pub async fn list(
    store: &dyn Store,
    fleet: &Fleet,
    wanted: &str,
) -> Result<Vec<v1::HostDrops>, DropsError> {
    let whom = Whom { patience: PATIENCE, ..Whom::new(None, wanted) };
    let answers =
        ask(
            fleet,
            whom,
            |mut agent| async move { agent.list_drops(v1::ListDropsRequest {}).await },
        );
    let answers = answers.await?;
    let names = Names::new(&vpc::list(store).await?, fleet.instances());
    let told = answers.into_iter().map(|Answer { host, role, answer }| {
        let (counts, problem) = match answer {
            Ok(answer) => (answer.drops, String::new()),
            Err(problem) => (vec![], problem),
        };
        let drops = counts.into_iter().map(|count| names.resolve(&host, role, count)).collect();
        v1::HostDrops { host, role: v1::Role::from(role).into(), drops, problem }
    });
    Ok(told.collect())
}

/// Who stands behind slots and VNIs.
struct Names {
    /// The running instance, by host and slot.
    instances: BTreeMap<(String, u32), v1::Instance>,
    /// Names of VPCs, by VNI.
    vpcs: BTreeMap<u32, String>,
}

impl Names {
    fn new(vpcs: &[Vpc], instances: Vec<v1::Instance>) -> Self {
        let running = instances
            .into_iter()
            .filter(|instance| instance.state() == v1::InstanceState::Running)
            .map(|instance| ((instance.host.clone(), instance.slot), instance));
        let vnis = |vpc: &Vpc| {
            vpc.vnis().into_iter().map(|vni| (vni, vpc.name.clone())).collect::<Vec<_>>()
        };
        let vpcs = vpcs.iter().flat_map(vnis);
        Self { instances: running.collect(), vpcs: vpcs.collect() }
    }

    fn resolve(&self, host: &str, role: Role, count: v1::DropCount) -> v1::ScopedDrops {
        let v1::DropCount { scope, reason, packets } = count;
        let (instance, vpc) = match role {
            Role::Host => match self.instances.get(&(host.to_owned(), scope)) {
                Some(instance) => (instance.id.clone(), instance.vpc.clone()),
                None => Default::default(),
            },
            Role::Proxy => (String::new(), self.vpcs.get(&scope).cloned().unwrap_or_default()),
        };
        v1::ScopedDrops { scope, reason, packets, instance, vpc }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(slot: u32, id: &str, state: v1::InstanceState) -> v1::Instance {
        v1::Instance {
            id: id.into(),
            vpc: "blue".into(),
            host: "h1".into(),
            slot,
            state: state.into(),
            ..v1::Instance::default()
        }
    }

    fn resolve(host: &str, role: Role, scope: u32) -> (String, String) {
        let definition = v1::Vpc {
            name: "green".into(),
            cidr: "10.1.0.0/16".into(),
            shared_address: "10.1.0.9".into(),
            interface: "eth1".into(),
            ..v1::Vpc::default()
        };
        let vpc = Vpc { vni: 4096, ..Vpc::try_from(definition).unwrap() };
        let instances = vec![
            instance(1, "runs", v1::InstanceState::Running),
            instance(2, "failed", v1::InstanceState::Failed),
        ];
        let count = v1::DropCount { scope, reason: "no-flow".into(), packets: 3 };
        let drops = Names::new(&[vpc], instances).resolve(host, role, count);
        assert_eq!((drops.scope, drops.reason.as_str(), drops.packets), (scope, "no-flow", 3));
        (drops.instance, drops.vpc)
    }

    #[test]
    fn slots_have_the_running_instance_and_its_vpc() {
        assert_eq!(resolve("h1", Role::Host, 1), ("runs".into(), "blue".into()));
        assert_eq!(resolve("h1", Role::Host, 2), Default::default(), "it ended");
        assert_eq!(resolve("h2", Role::Host, 1), Default::default(), "another host's slot");
        assert_eq!(resolve("h1", Role::Host, 4096), Default::default(), "a slot is no VNI");
    }

    #[test]
    fn vnis_have_the_vpc() {
        assert_eq!(resolve("p1", Role::Proxy, 4096), (String::new(), "green".into()));
        assert_eq!(resolve("p1", Role::Proxy, 4097), Default::default());
        assert_eq!(resolve("p1", Role::Proxy, 0), Default::default());
        assert_eq!(resolve("h1", Role::Proxy, 1), Default::default(), "a VNI is no slot");
    }
}
