//! The rows of what was dropped.

use serde::Serialize;
use warren_proto::v1;

use super::{Row, dash, some};

/// What a counter is of, on its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The whole host or proxy.
    All,
    /// A slot of a host.
    Slot(u32),
    /// A VPC on a proxy.
    Vni(u32),
}

/// What was dropped of a scope for a reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DropRow {
    host: String,
    slot: Option<u32>,
    vni: Option<u32>,
    instance: Option<String>,
    vpc: Option<String>,
    /// Name of the reason.
    pub reason: String,
    /// Packets.
    pub packets: u64,
}

impl DropRow {
    /// What it is of.
    pub fn scope(&self) -> Scope {
        match (self.slot, self.vni) {
            (Some(slot), _) => Scope::Slot(slot),
            (None, Some(vni)) => Scope::Vni(vni),
            (None, None) => Scope::All,
        }
    }
}

/// The rows of one host or proxy.
pub fn drop_rows(host: v1::HostDrops) -> Vec<DropRow> {
    let (is_proxy, name) = (host.role() == v1::Role::Proxy, host.host);
    let row = |drops: v1::ScopedDrops| {
        let scope = (drops.scope != 0).then_some(drops.scope);
        let (slot, vni) = if is_proxy { (None, scope) } else { (scope, None) };
        DropRow {
            host: name.clone(),
            slot,
            vni,
            instance: some(drops.instance),
            vpc: some(drops.vpc),
            reason: drops.reason,
            packets: drops.packets,
        }
    };
    host.drops.into_iter().map(row).collect()
}

impl Row for DropRow {
    const HEADER: &'static [&'static str] =
        &["HOST", "SCOPE", "INSTANCE", "VPC", "REASON", "PACKETS"];

    fn cells(&self) -> Vec<String> {
        let scope = match self.scope() {
            Scope::All => "-".to_owned(),
            Scope::Slot(slot) => format!("slot {slot}"),
            Scope::Vni(vni) => format!("VNI {vni}"),
        };
        vec![
            self.host.clone(),
            scope,
            dash(self.instance.as_deref()),
            dash(self.vpc.as_deref()),
            self.reason.clone(),
            self.packets.to_string(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Output;
    use crate::render::{chunk, list};

    fn drops(scope: u32, instance: &str, vpc: &str) -> v1::ScopedDrops {
        let (reason, instance, vpc) = ("no-flow".into(), instance.into(), vpc.into());
        v1::ScopedDrops { scope, reason, packets: 12, instance, vpc }
    }

    #[test]
    fn scopes_are_slots_on_hosts_and_vnis_on_proxies() {
        let host = v1::HostDrops {
            host: "h1".into(),
            role: v1::Role::Host.into(),
            drops: vec![drops(0, "", ""), drops(3, "1111", "blue")],
            problem: String::new(),
        };
        let proxy = v1::HostDrops {
            host: "p1".into(),
            role: v1::Role::Proxy.into(),
            drops: vec![drops(4096, "", "blue")],
            problem: String::new(),
        };
        let rows = [drop_rows(host), drop_rows(proxy)].concat();
        assert_eq!(
            list(Output::Table, &rows),
            "HOST  SCOPE     INSTANCE  VPC   REASON   PACKETS\n\
             h1    -         -         -     no-flow  12\n\
             h1    slot 3    1111      blue  no-flow  12\n\
             p1    VNI 4096  -         blue  no-flow  12"
        );
        let lines = chunk(Output::Json, &rows);
        let json: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(json.len(), 3);
        assert!(json[0]["slot"].is_null() && json[0]["vni"].is_null());
        assert_eq!((&json[1]["slot"], &json[1]["vpc"]), (&3.into(), &"blue".into()));
        assert_eq!((&json[2]["vni"], &json[2]["packets"]), (&4096.into(), &12.into()));
    }
}
