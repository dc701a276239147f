//! The VPCs that a host knows, kept in its run directory for a daemon that restarts.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use warren_proto::security::Security;

use super::HostError;
use crate::services::Naming;

/// What a host knows of a VPC with one of its shared addresses, beside what the data path does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vpc {
    pub vni: u32,
    pub shared_address: Ipv4Addr,
    /// Which of the VPC's addresses instances get first: the one with the least.
    #[serde(default)]
    pub rank: u32,
    pub naming: Naming,
    #[serde(default)]
    pub security: Security,
}

/// VPCs by name: each with the shared addresses of which this host has ports, by their rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "HashMap<String, Value>")]
pub(super) struct Vpcs(HashMap<String, Vec<Vpc>>);

impl TryFrom<HashMap<String, Value>> for Vpcs {
    type Error = serde_json::Error;

    /// From what is stored, or was when a VPC had one address.
    fn try_from(stored: HashMap<String, Value>) -> Result<Self, Self::Error> {
        let vpcs = |(name, stored)| {
            let vpcs = match stored {
                Value::Array(_) => serde_json::from_value(stored)?,
                _ => vec![serde_json::from_value(stored)?],
            };
            Ok((name, vpcs))
        };
        stored.into_iter().map(vpcs).collect::<Result<_, _>>().map(Self)
    }
}

impl Vpcs {
    /// A VPC with each of its addresses, by their rank; none if it is not known.
    pub fn of(&self, name: &str) -> &[Vpc] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// A VPC with one of its addresses.
    pub fn find(&self, name: &str, vni: u32) -> Option<&Vpc> {
        self.of(name).iter().find(|vpc| vpc.vni == vni)
    }

    /// All VPCs with all their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Vpc)> {
        self.0.iter().flat_map(|(name, vpcs)| vpcs.iter().map(move |vpc| (name.as_str(), vpc)))
    }

    /// Replaces what is known of an address.
    pub fn insert(&mut self, name: &str, vpc: Vpc) {
        self.remove(vpc.vni);
        let vpcs = self.0.entry(name.to_owned()).or_default();
        vpcs.push(vpc);
        vpcs.sort_by_key(|vpc| (vpc.rank, vpc.vni));
    }

    /// Forgets an address.
    pub fn remove(&mut self, vni: u32) {
        self.0.values_mut().for_each(|vpcs| vpcs.retain(|vpc| vpc.vni != vni));
        self.0.retain(|_, vpcs| !vpcs.is_empty());
    }
}

fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("vpcs.json")
}

/// The VPCs, as they were saved; none if they never were.
pub(super) fn load(run_dir: &Path) -> Result<Vpcs, HostError> {
    let file = file(run_dir);
    match std::fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|e| HostError::Record(format!("{}: {e}: remove it", file.display()))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vpcs::default()),
        Err(error) => Err(HostError::Record(format!("{}: {error}", file.display()))),
    }
}

/// Replaces what was saved, whole or not at all.
pub(super) fn save(run_dir: &Path, vpcs: &Vpcs) -> Result<(), HostError> {
    let file = file(run_dir);
    let new = file.with_extension("new");
    let text = serde_json::to_vec(vpcs).map_err(|e| HostError::Record(e.to_string()))?;
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, &file))
        .map_err(|e| HostError::Record(format!("{}: {e}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vpc(vni: u32, rank: u32) -> Vpc {
        let (naming, mut security) = (Naming::default(), Security::default());
        security.groups.insert("web".into(), [(7, "100 allow tcp 443".parse().unwrap())].into());
        Vpc { vni, shared_address: Ipv4Addr::from(vni), rank, naming, security }
    }

    #[test]
    fn addresses_of_a_vpc_are_in_the_order_of_their_ranks() {
        let mut vpcs = Vpcs::default();
        for (vni, rank) in [(7, 1), (8, 0), (9, 2), (7, 3)] {
            vpcs.insert("blue", vpc(vni, rank));
        }
        let order = |vpcs: &Vpcs| vpcs.of("blue").iter().map(|vpc| vpc.vni).collect::<Vec<_>>();
        assert_eq!(order(&vpcs), [8, 9, 7]);
        vpcs.insert("red", vpc(9, 0));
        assert_eq!(order(&vpcs), [8, 7], "a VNI is one VPC's");
        vpcs.remove(9);
        assert_eq!(vpcs.of("red"), []);
        assert_eq!(vpcs.iter().count(), 2);
    }

    #[test]
    fn what_was_stored_when_a_vpc_had_one_address_is_read() {
        let one = serde_json::json!({ "blue": vpc(7, 0) }).to_string();
        let vpcs: Vpcs = serde_json::from_str(&one).unwrap();
        assert_eq!(vpcs.of("blue"), [vpc(7, 0)]);
        let again = serde_json::to_string(&vpcs).unwrap();
        assert_eq!(serde_json::from_str::<Vpcs>(&again).unwrap(), vpcs);
    }
}
