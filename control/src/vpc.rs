//! VPCs: what makes a valid one, and how they are created.

mod v6;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};
use warren_proto::route::{Route, defaults};
use warren_proto::v1;

pub use v6::VpcV6;

use crate::name::{self, InvalidName};
use crate::store::{Entry, Precondition, Store, StoreError, Write, decode};

/// Where leases are stored: `ports/VPC` those of a VPC's first shared address, `ports/VPC/PLACE` those
/// of the others.
pub const LEASES_PREFIX: &str = "ports/";
/// Where VPCs are stored: `vpc/NAME`.
pub const VPC_PREFIX: &str = "vpc/";
/// The VNI of the next VPC. It only grows: packets of a deleted VPC must never enter another.
const NEXT_VNI: &str = "next-vni";
/// VNIs below are left to networks that exist already.
const FIRST_VNI: u32 = 4096;
/// VXLAN has 24 bits for it.
const LAST_VNI: u32 = (1 << 24) - 1;
const DEFAULT_PORTS_PER_HOST: u32 = 64;
/// The guests' side of each slot, on every host: a VPC with these addresses would be out of reach.
const GUEST_ADDRESSES: (Ipv4Addr, u8) = (Ipv4Addr::new(169, 254, 0, 0), 16);

/// An address that a VPC's microVMs are seen as, and the network between hosts and proxies that
/// belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedAddress {
    /// VXLAN network identifier; 0 until it is stored.
    pub vni: u32,
    /// The address. In the VPC's CIDR.
    pub address: Ipv4Addr,
    /// The one of IPv6 that goes with it, if the VPC has IPv6.
    pub address_v6: Option<Ipv6Addr>,
}

impl SharedAddress {
    fn all(self) -> impl Iterator<Item = IpAddr> {
        [self.address.into()].into_iter().chain(self.address_v6.map(IpAddr::from))
    }
}

/// A VPC that was found valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vpc {
    /// An RFC 1123 label.
    pub name: String,
    /// VXLAN network identifier of its first shared address; 0 until it is stored.
    pub vni: u32,
    /// Its addresses. The prefix is 1 to 30 bits long.
    pub cidr: Ipv4Network,
    /// The address that its microVMs are seen as. In `cidr`.
    pub shared_address: Ipv4Addr,
    /// Interface of the proxy nodes that stands in the VPC, 1 to 15 bytes.
    pub interface: String,
    /// Next hop for other addresses. In `cidr`.
    pub gateway: Option<Ipv4Addr>,
    /// Its IPv6, if it has any.
    #[serde(default)]
    pub v6: Option<VpcV6>,
    /// Ports of the shared address that each host holds at least: a power of two, 64 to 32768.
    pub ports_per_host: u32,
    /// Where its microVMs' DNS queries go; without it, they are refused.
    #[serde(default)]
    pub resolver: Option<Ipv4Addr>,
    /// Where names of one label are looked for first; empty: nowhere.
    #[serde(default)]
    pub search_domain: String,
    /// Further addresses that its microVMs are seen as. They only become more.
    #[serde(default)]
    pub more_addresses: Vec<SharedAddress>,
    /// By whose addresses leaves what has no route in it.
    #[serde(default)]
    pub public: Option<Public>,
    /// The VPC that leaves by its addresses; none if it has microVMs of its own.
    #[serde(default)]
    pub public_of: Option<String>,
}

/// The VPC by whose addresses another one leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Public {
    /// Its name.
    pub vpc: String,
    /// The VNIs of its addresses: one for each place of the other's.
    pub vnis: Vec<u32>,
}

impl Vpc {
    /// The routes that it has without a table.
    pub fn defaults(&self) -> Vec<Route> {
        let v4 = defaults(self.cidr.into(), self.gateway.map(Into::into));
        v4.chain(self.v6.iter().flat_map(VpcV6::defaults)).collect()
    }

    /// The addresses that its microVMs are seen as, each at its place.
    pub fn shared_addresses(&self) -> impl Iterator<Item = SharedAddress> {
        let address_v6 = self.v6.map(|v6| v6.shared_address);
        let first = SharedAddress { vni: self.vni, address: self.shared_address, address_v6 };
        [first].into_iter().chain(self.more_addresses.iter().copied())
    }

    /// The addresses that its microVMs are seen as, of either family.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.shared_addresses().flat_map(SharedAddress::all).collect()
    }

    /// The VNIs of its shared addresses, each at its place.
    pub fn vnis(&self) -> Vec<u32> {
        self.shared_addresses().map(|shared| shared.vni).collect()
    }

    /// The VNI by which leaves what has no route, of what has the VNI of one of its shared addresses.
    pub fn public_vni(&self, vni: u32) -> Option<u32> {
        let place = self.shared_addresses().position(|shared| shared.vni == vni)?;
        self.public.as_ref()?.vnis.get(place).copied()
    }

    /// Checks an address that is to be one more.
    fn check_more(&self, more: &v1::SharedAddress) -> Result<SharedAddress, InvalidVpc> {
        const ADDRESS: &str = "more_addresses.address";
        const ADDRESS_V6: &str = "more_addresses.address_v6";
        let invalid = |field| move |problem: String| InvalidVpc { field, problem };
        if more.vni != 0 {
            let problem = "the control plane gives it: leave it 0".to_owned();
            return Err(invalid("more_addresses.vni")(problem));
        }
        let address = parse_address(&more.address, self.cidr).map_err(invalid(ADDRESS))?;
        let address_v6 = match (&self.v6, more.address_v6.as_str()) {
            (None, "") => None,
            (None, text) => {
                let problem = format!("{text}: the VPC has no IPv6");
                return Err(invalid(ADDRESS_V6)(problem));
            }
            (Some(v6), text) => Some(v6.parse_shared(text).map_err(invalid(ADDRESS_V6))?),
        };
        if self.gateway == Some(address) {
            return Err(invalid(ADDRESS)(format!("{address} is the gateway")));
        }
        Ok(SharedAddress { vni: 0, address, address_v6 })
    }

    /// Gives its addresses, from this place on, the VNIs from this one on. The next one.
    fn number(&mut self, place: usize, mut next: u32) -> Result<u32, CreateVpcError> {
        let first = Some(&mut self.vni);
        let all = first.into_iter().chain(self.more_addresses.iter_mut().map(|more| &mut more.vni));
        for vni in all.skip(place) {
            if next > LAST_VNI {
                return Err(CreateVpcError::NoVniLeft);
            }
            *vni = next;
            next += 1;
        }
        Ok(next)
    }

    /// Has it leave by the addresses of its public VPC, as far as it has any itself.
    fn leave_by(&mut self, public: &Self) -> Result<(), InvalidVpc> {
        let Some(Public { vpc, vnis }) = &mut self.public else { return Ok(()) };
        let places = 1 + self.more_addresses.len();
        *vnis = public.vnis();
        if vnis.len() < places {
            let problem = format!(
                "{vpc} has {} addresses, and {} has {places}: give it more: `warren vpc add-address`",
                vnis.len(),
                self.name
            );
            return Err(InvalidVpc { field: "public", problem });
        }
        vnis.truncate(places);
        Ok(())
    }

    /// Whether it was defined as this one, whose VNIs are not given yet.
    fn is_defined_as(&self, wanted: &Self) -> bool {
        let mut bare = self.clone();
        bare.vni = 0;
        bare.more_addresses.iter_mut().for_each(|more| more.vni = 0);
        bare.public.iter_mut().for_each(|public| public.vnis.clear());
        bare.public_of = None;
        bare == *wanted
    }
}

/// A definition that makes no VPC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidVpc {
    /// Name of the field of `warren.v1.Vpc`.
    pub field: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

/// Why a VPC was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateVpcError {
    /// The definition is wrong.
    #[error(transparent)]
    Invalid(#[from] InvalidVpc),
    /// The name is taken.
    #[error(
        "VPC \"{0}\" exists with another definition: `warren vpc ls` shows it; choose another name"
    )]
    Exists(String),
    /// Replies could not be told apart.
    #[error(
        "{address} on {interface} is the shared address of VPC \"{other}\": choose another address"
    )]
    AddressTaken {
        /// The wanted address.
        address: IpAddr,
        /// The wanted interface.
        interface: String,
        /// Whose it is.
        other: String,
    },
    /// What has no route would not leave by what is asked for.
    #[error("public: {vpc} {problem}")]
    NotPublic {
        /// What is asked for.
        vpc: String,
        /// Why it is none.
        problem: String,
    },
    /// Nothing can be added to what is not there.
    #[error("there is no VPC \"{0}\": `warren vpc create` makes one")]
    Unknown(String),
    /// 16 million VPCs were made.
    #[error("no VXLAN network identifier is left")]
    NoVniLeft,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TryFrom<v1::Vpc> for Vpc {
    type Error = InvalidVpc;

    fn try_from(vpc: v1::Vpc) -> Result<Self, InvalidVpc> {
        let invalid = |field| move |problem: String| InvalidVpc { field, problem };
        name::label(&vpc.name).map_err(|InvalidName(problem)| invalid("name")(problem))?;
        if vpc.vni != 0 {
            return Err(invalid("vni")("the control plane gives it: leave it 0".into()));
        }
        let cidr = parse_cidr(&vpc.cidr).map_err(invalid("cidr"))?;
        let shared_address =
            parse_address(&vpc.shared_address, cidr).map_err(invalid("shared_address"))?;
        check_interface(&vpc.interface).map_err(invalid("interface"))?;
        let gateway = match vpc.gateway.as_str() {
            "" => None,
            text => Some(parse_address(text, cidr).map_err(invalid("gateway"))?),
        };
        if gateway == Some(shared_address) {
            let problem =
                format!("{shared_address} is the shared address: the next hop is another");
            return Err(invalid("gateway")(problem));
        }
        let v6 = VpcV6::parse(&vpc)?;
        let ports_per_host = match vpc.ports_per_host {
            0 => DEFAULT_PORTS_PER_HOST,
            ports if ports.is_power_of_two() && (64..=32768).contains(&ports) => ports,
            ports => {
                let problem = format!("{ports} is not a power of two from 64 to 32768");
                return Err(invalid("ports_per_host")(problem));
            }
        };
        let resolver = match vpc.resolver.as_str() {
            "" => None,
            text => Some(parse_resolver(text).map_err(invalid("resolver"))?),
        };
        if !vpc.search_domain.is_empty() {
            name::host(&vpc.search_domain)
                .map_err(|InvalidName(problem)| invalid("search_domain")(problem))?;
        }
        if !vpc.public_of.is_empty() {
            let problem = "the control plane gives it: leave it empty".to_owned();
            return Err(invalid("public_of")(problem));
        }
        let public = Some(vpc.public).filter(|public| !public.is_empty());
        let mut valid = Self {
            name: vpc.name,
            vni: 0,
            cidr,
            shared_address,
            interface: vpc.interface,
            gateway,
            v6,
            ports_per_host,
            resolver,
            search_domain: vpc.search_domain,
            more_addresses: Vec::new(),
            public: public.map(|vpc| Public { vpc, vnis: Vec::new() }),
            public_of: None,
        };
        for more in &vpc.more_addresses {
            let more = valid.check_more(more)?;
            let known = valid.addresses();
            if let Some(twice) = more.all().find(|address| known.contains(address)) {
                let problem = format!("{twice} is there twice");
                return Err(invalid("more_addresses")(problem));
            }
            valid.more_addresses.push(more);
        }
        Ok(valid)
    }
}

impl From<Vpc> for v1::Vpc {
    fn from(vpc: Vpc) -> Self {
        let [cidr_v6, shared_address_v6, gateway_v6] = VpcV6::texts(vpc.v6);
        Self {
            name: vpc.name,
            vni: vpc.vni,
            cidr: vpc.cidr.to_string(),
            shared_address: vpc.shared_address.to_string(),
            interface: vpc.interface,
            gateway: vpc.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
            ports_per_host: vpc.ports_per_host,
            resolver: vpc.resolver.map(|resolver| resolver.to_string()).unwrap_or_default(),
            search_domain: vpc.search_domain,
            cidr_v6,
            shared_address_v6,
            gateway_v6,
            more_addresses: vpc.more_addresses.into_iter().map(Into::into).collect(),
            public: vpc.public.map(|public| public.vpc).unwrap_or_default(),
            public_of: vpc.public_of.unwrap_or_default(),
        }
    }
}

impl From<SharedAddress> for v1::SharedAddress {
    fn from(SharedAddress { vni, address, address_v6 }: SharedAddress) -> Self {
        let address_v6 = address_v6.map(|address| address.to_string()).unwrap_or_default();
        Self { address: address.to_string(), address_v6, vni }
    }
}

fn parse_cidr(text: &str) -> Result<Ipv4Network, String> {
    if !text.contains('/') {
        return Err(format!("\"{text}\" is not a CIDR: write it like 10.1.0.0/16"));
    }
    let cidr: Ipv4Network =
        text.parse().map_err(|_| format!("\"{text}\" is not an IPv4 CIDR such as 10.1.0.0/16"))?;
    if !(1..=30).contains(&cidr.prefix()) {
        return Err(format!("/{} is not a prefix length from 1 to 30", cidr.prefix()));
    }
    if cidr.ip() != cidr.network() {
        let network = cidr.network();
        let prefix = cidr.prefix();
        return Err(format!("{text} has bits set behind its prefix: write {network}/{prefix}"));
    }
    let (guests, prefix) = GUEST_ADDRESSES;
    if cidr.contains(guests) || guests.octets()[..2] == cidr.ip().octets()[..2] {
        return Err(format!(
            "{text} overlaps {guests}/{prefix}, where microVMs have their local addresses"
        ));
    }
    Ok(cidr)
}

fn parse_address(text: &str, cidr: Ipv4Network) -> Result<Ipv4Addr, String> {
    let address: Ipv4Addr =
        text.parse().map_err(|_| format!("\"{text}\" is not an IPv4 address"))?;
    if !cidr.contains(address) {
        return Err(format!("{address} is not inside {cidr}"));
    }
    if address == cidr.network() || address == cidr.broadcast() {
        return Err(format!("{address} is the network or broadcast address of {cidr}"));
    }
    Ok(address)
}

fn parse_resolver(text: &str) -> Result<Ipv4Addr, String> {
    let address: Ipv4Addr =
        text.parse().map_err(|_| format!("\"{text}\" is not an IPv4 address"))?;
    let [first, ..] = address.octets();
    if first == 0 || first >= 224 || address.is_loopback() || address.is_link_local() {
        return Err(format!("{address} is no address that a host in the VPC can have"));
    }
    Ok(address)
}

fn check_interface(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if name.is_empty() || name.len() > 15 {
        return Err(format!("\"{name}\" has {} bytes: a device name has 1 to 15", name.len()));
    }
    if !name.bytes().all(allowed) || name == "." || name == ".." {
        return Err(format!("\"{name}\" is not a device name: `ip link` lists the proxy's"));
    }
    Ok(())
}

/// Where the leases of one of a VPC's shared addresses are stored.
pub fn leases_key(vpc: &str, place: usize) -> String {
    match place {
        0 => format!("{LEASES_PREFIX}{vpc}"),
        _ => format!("{LEASES_PREFIX}{vpc}/{place}"),
    }
}

/// All VPCs, by name.
pub async fn list(store: &dyn Store) -> Result<Vec<Vpc>, StoreError> {
    let (_, entries) = store.list(VPC_PREFIX).await?;
    entries.iter().map(|entry| decode(&entry.key, &entry.value)).collect()
}

/// The VPC of this name, if it exists.
pub async fn get(store: &dyn Store, name: &str) -> Result<Option<Vpc>, StoreError> {
    let entry = store.get(&format!("{VPC_PREFIX}{name}")).await?;
    entry.map(|entry| decode(&entry.key, &entry.value)).transpose()
}

/// Stores a new VPC and gives it its VNI. The same definition again changes nothing.
pub async fn create(store: &dyn Store, definition: v1::Vpc) -> Result<Vpc, CreateVpcError> {
    let wanted = Vpc::try_from(definition)?;
    loop {
        match try_create(store, wanted.clone()).await {
            // Another VPC was created between reading and writing.
            Err(CreateVpcError::Store(StoreError::Conflict(_))) => {}
            done => return done,
        }
    }
}

async fn try_create(store: &dyn Store, mut wanted: Vpc) -> Result<Vpc, CreateVpcError> {
    let (counter, vni) = next_vni(store).await?;
    for existing in list(store).await? {
        if existing.name == wanted.name {
            let same = existing.is_defined_as(&wanted);
            return if same { Ok(existing) } else { Err(CreateVpcError::Exists(existing.name)) };
        }
        check_free(&existing, &wanted.interface, wanted.shared_addresses())?;
    }
    let next = wanted.number(0, vni)?;
    let key = format!("{VPC_PREFIX}{}", wanted.name);
    let mut preconditions =
        vec![Precondition::unchanged(NEXT_VNI, counter.as_ref()), Precondition::absent(&key)];
    let mut writes = vec![Write::put(NEXT_VNI, &next)?];
    if let Some(Public { vpc, .. }) = &wanted.public {
        let (entry, mut public) = find_public(store, vpc).await?;
        wanted.leave_by(&public)?;
        public.public_of = Some(wanted.name.clone());
        // Whoever leases ports of it meanwhile finds it changed, or is found here.
        preconditions.push(Precondition::unchanged(&entry.key, Some(&entry)));
        for place in 0..public.shared_addresses().count() {
            preconditions.push(Precondition::absent(leases_key(&public.name, place)));
        }
        writes.push(Write::put(entry.key, &public)?);
    }
    writes.push(Write::put(key, &wanted)?);
    store.commit(preconditions, writes).await?;
    Ok(wanted)
}

/// The VPC of this name, as it is stored, if another may leave by its addresses.
async fn find_public(store: &dyn Store, name: &str) -> Result<(Entry, Vpc), CreateVpcError> {
    let key = format!("{VPC_PREFIX}{name}");
    let no = |problem: String| CreateVpcError::NotPublic { vpc: name.to_owned(), problem };
    let entry = store.get(&key).await?;
    let entry = entry.ok_or_else(|| no("is not there: `warren vpc create` makes one".into()))?;
    let vpc: Vpc = decode(&key, &entry.value)?;
    if let Some(other) = &vpc.public_of {
        return Err(no(format!("is that of VPC {other}: create one for each")));
    }
    if let Some(further) = &vpc.public {
        return Err(no(format!("leaves by {} itself: name that, or another", further.vpc)));
    }
    for place in 0..vpc.shared_addresses().count() {
        if store.get(&leases_key(name, place)).await?.is_some() {
            let problem = "has microVMs of its own, or had: create one for this purpose";
            return Err(no(problem.into()));
        }
    }
    Ok((entry, vpc))
}

/// Gives a VPC one more shared address. One that it has changes nothing.
pub async fn add_address(
    store: &dyn Store,
    name: &str,
    address: v1::SharedAddress,
) -> Result<Vpc, CreateVpcError> {
    loop {
        match try_add_address(store, name, &address).await {
            Err(CreateVpcError::Store(StoreError::Conflict(_))) => {}
            done => return done,
        }
    }
}

async fn try_add_address(
    store: &dyn Store,
    name: &str,
    address: &v1::SharedAddress,
) -> Result<Vpc, CreateVpcError> {
    let (counter, vni) = next_vni(store).await?;
    let key = format!("{VPC_PREFIX}{name}");
    let unknown = || CreateVpcError::Unknown(name.to_owned());
    let entry = store.get(&key).await?.ok_or_else(unknown)?;
    let mut vpc: Vpc = decode(&key, &entry.value)?;
    let more = vpc.check_more(address)?;
    if vpc.shared_addresses().any(|known| SharedAddress { vni: 0, ..known } == more) {
        return Ok(vpc);
    }
    for existing in list(store).await? {
        check_free(&existing, &vpc.interface, [more])?;
    }
    vpc.more_addresses.push(more);
    let next = vpc.number(vpc.more_addresses.len(), vni)?;
    if let Some(Public { vpc: name, .. }) = &vpc.public
        && let Some(public) = get(store, name).await?
    {
        vpc.leave_by(&public)?;
    }
    let preconditions = vec![
        Precondition::unchanged(NEXT_VNI, counter.as_ref()),
        Precondition::unchanged(&key, Some(&entry)),
    ];
    let writes = vec![Write::put(NEXT_VNI, &next)?, Write::put(key, &vpc)?];
    store.commit(preconditions, writes).await?;
    Ok(vpc)
}

/// The next VNI, and the counter that it is from. Its revision is to be a precondition: so additions
/// are one after another, and what is found free after this stays free.
async fn next_vni(store: &dyn Store) -> Result<(Option<Entry>, u32), StoreError> {
    let counter = store.get(NEXT_VNI).await?;
    let vni = match &counter {
        Some(entry) => decode(NEXT_VNI, &entry.value)?,
        None => FIRST_VNI,
    };
    Ok((counter, vni))
}

/// That none of these addresses is another's on the same interface.
fn check_free(
    existing: &Vpc,
    interface: &str,
    wanted: impl IntoIterator<Item = SharedAddress>,
) -> Result<(), CreateVpcError> {
    let taken = existing.addresses();
    let mut wanted = wanted.into_iter().flat_map(SharedAddress::all);
    match wanted.find(|address| taken.contains(address)) {
        Some(address) if existing.interface == interface => Err(CreateVpcError::AddressTaken {
            address,
            interface: interface.to_owned(),
            other: existing.name.clone(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::SqliteStore;

    fn valid() -> v1::Vpc {
        v1::Vpc {
            name: "blue".into(),
            vni: 0,
            cidr: "10.1.0.0/16".into(),
            shared_address: "10.1.0.9".into(),
            interface: "eth1".into(),
            gateway: "10.1.0.1".into(),
            ports_per_host: 0,
            resolver: "10.1.0.2".into(),
            search_domain: "corp.internal".into(),
            cidr_v6: "2001:db8:1::/64".into(),
            shared_address_v6: "2001:db8:1::9".into(),
            gateway_v6: "fe80::1".into(),
            ..v1::Vpc::default()
        }
    }

    #[test]
    fn defaults_are_filled_in() {
        let vpc = Vpc::try_from(valid()).unwrap();
        assert_eq!(vpc.ports_per_host, 64);
        assert_eq!(v1::Vpc::from(vpc), v1::Vpc { ports_per_host: 64, ..valid() });
        let none = v1::Vpc { gateway: String::new(), ..valid() };
        assert_eq!(Vpc::try_from(none).unwrap().gateway, None);
        let none = v1::Vpc { resolver: String::new(), search_domain: String::new(), ..valid() };
        assert_eq!(Vpc::try_from(none).unwrap().resolver, None);
        let none = v1::Vpc { cidr_v6: String::new(), shared_address_v6: String::new(), ..valid() };
        let none = v1::Vpc { gateway_v6: String::new(), ..none };
        assert_eq!(Vpc::try_from(none).unwrap().v6, None);
    }

    #[test]
    fn what_was_stored_before_ipv6_has_none() {
        let vpc = Vpc::try_from(valid()).unwrap();
        let mut stored = serde_json::to_value(&vpc).unwrap();
        assert_eq!(serde_json::from_value::<Vpc>(stored.clone()).unwrap(), vpc);
        stored.as_object_mut().unwrap().remove("v6").unwrap();
        assert_eq!(serde_json::from_value::<Vpc>(stored).unwrap(), Vpc { v6: None, ..vpc });
    }

    #[test]
    fn errors_name_the_field_and_the_value() {
        let cases: [(&str, &str, v1::Vpc); 25] = [
            ("name", "empty", v1::Vpc { name: String::new(), ..valid() }),
            ("name", "Blue", v1::Vpc { name: "Blue".into(), ..valid() }),
            ("vni", "leave it 0", v1::Vpc { vni: 5, ..valid() }),
            ("cidr", "\"\"", v1::Vpc { cidr: String::new(), ..valid() }),
            ("cidr", "10.1.0.0", v1::Vpc { cidr: "10.1.0.0".into(), ..valid() }),
            ("cidr", "fd00::/8", v1::Vpc { cidr: "fd00::/8".into(), ..valid() }),
            ("cidr", "write 10.1.0.0/16", v1::Vpc { cidr: "10.1.2.3/16".into(), ..valid() }),
            ("cidr", "/31", v1::Vpc { cidr: "10.1.0.0/31".into(), ..valid() }),
            ("cidr", "/0", v1::Vpc { cidr: "0.0.0.0/0".into(), ..valid() }),
            ("cidr", "169.254.0.0/16", v1::Vpc { cidr: "169.254.7.0/24".into(), ..valid() }),
            ("cidr", "169.254.0.0/16", v1::Vpc { cidr: "128.0.0.0/1".into(), ..valid() }),
            ("shared_address", "\"x\"", v1::Vpc { shared_address: "x".into(), ..valid() }),
            ("shared_address", "inside", v1::Vpc { shared_address: "10.2.0.9".into(), ..valid() }),
            ("shared_address", "network", v1::Vpc { shared_address: "10.1.0.0".into(), ..valid() }),
            ("interface", "0 bytes", v1::Vpc { interface: String::new(), ..valid() }),
            ("interface", "16 bytes", v1::Vpc { interface: "e".repeat(16), ..valid() }),
            ("interface", "a/b", v1::Vpc { interface: "a/b".into(), ..valid() }),
            ("gateway", "shared", v1::Vpc { gateway: "10.1.0.9".into(), ..valid() }),
            ("ports_per_host", "1000", v1::Vpc { ports_per_host: 1000, ..valid() }),
            ("ports_per_host", "65536", v1::Vpc { ports_per_host: 65536, ..valid() }),
            ("resolver", "\"ns\"", v1::Vpc { resolver: "ns".into(), ..valid() }),
            ("resolver", "169.254", v1::Vpc { resolver: "169.254.169.253".into(), ..valid() }),
            ("search_domain", "empty", v1::Vpc { search_domain: "a..b".into(), ..valid() }),
            ("search_domain", "a b", v1::Vpc { search_domain: "a b".into(), ..valid() }),
            ("search_domain", "253", v1::Vpc { search_domain: "a.".repeat(127), ..valid() }),
        ];
        for (field, part, definition) in cases {
            let error = Vpc::try_from(definition).unwrap_err();
            assert_eq!(error.field, field, "{error}");
            assert!(error.to_string().contains(part), "{error} should contain {part}");
        }
    }

    async fn store(directory: &tempfile::TempDir) -> Arc<dyn Store> {
        Arc::new(SqliteStore::open(&directory.path().join("state.db")).await.unwrap())
    }

    #[tokio::test]
    async fn a_vpc_leaves_by_one_that_is_there_for_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        let out = |name: &str, last: u8| v1::Vpc {
            name: name.into(),
            cidr: "203.0.113.0/24".into(),
            shared_address: format!("203.0.113.{last}"),
            interface: "eth2".into(),
            ..v1::Vpc::default()
        };
        let blue = v1::Vpc { public: "blue-out".into(), ..valid() };
        let refused = async |vpc: &v1::Vpc| create(&*store, vpc.clone()).await.unwrap_err();
        assert!(refused(&blue).await.to_string().contains("blue-out is not there"));
        let vni = create(&*store, out("blue-out", 7)).await.unwrap().vni;
        let created = create(&*store, blue.clone()).await.unwrap();
        assert_eq!(created.public_vni(created.vni), Some(vni));
        assert_eq!(create(&*store, blue.clone()).await.unwrap(), created);
        let public = get(&*store, "blue-out").await.unwrap().unwrap();
        assert_eq!(public.public_of.as_deref(), Some("blue"));
        assert_eq!(create(&*store, out("blue-out", 7)).await.unwrap(), public);

        let red = |public: &str| v1::Vpc {
            name: "red".into(),
            interface: "eth3".into(),
            public: public.into(),
            ..valid()
        };
        let taken = refused(&red("blue-out")).await.to_string();
        assert!(taken.contains("blue-out is that of VPC blue"), "{taken}");
        let chained = refused(&red("blue")).await.to_string();
        assert!(chained.contains("blue leaves by blue-out itself"), "{chained}");
        create(&*store, out("used", 8)).await.unwrap();
        let lease = Write::put(leases_key("used", 0), &crate::ports::Leases::default()).unwrap();
        store.commit(Vec::new(), vec![lease]).await.unwrap();
        let used = refused(&red("used")).await.to_string();
        assert!(used.contains("used has microVMs of its own"), "{used}");

        let more = |address: &str, v6: &str| v1::SharedAddress {
            address: address.into(),
            address_v6: v6.into(),
            vni: 0,
        };
        let second = more("10.1.0.10", "2001:db8:1::a");
        let few = add_address(&*store, "blue", second.clone()).await.unwrap_err().to_string();
        assert!(few.contains("blue-out has 1 addresses, and blue has 2"), "{few}");
        let public = add_address(&*store, "blue-out", more("203.0.113.9", "")).await.unwrap();
        let blue = add_address(&*store, "blue", second).await.unwrap();
        let leaves_by: Vec<_> =
            blue.vnis().into_iter().filter_map(|vni| blue.public_vni(vni)).collect();
        assert_eq!(leaves_by, public.vnis());
    }

    #[tokio::test]
    async fn vnis_are_different_and_a_repetition_is_no_new_vpc() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        let definition = |index: u32| v1::Vpc {
            name: format!("vpc-{index}"),
            shared_address: format!("10.1.0.{}", 10 + index),
            shared_address_v6: format!("2001:db8:1::{}", 10 + index),
            ..valid()
        };
        let creations: Vec<_> = (0..10)
            .map(|index| {
                let store = store.clone();
                tokio::spawn(async move { create(&*store, definition(index)).await.unwrap().vni })
            })
            .collect();
        let mut vnis = Vec::new();
        for creation in creations {
            vnis.push(creation.await.unwrap());
        }
        vnis.sort_unstable();
        assert_eq!(vnis, (4096..4106).collect::<Vec<_>>());

        let again = create(&*store, definition(3)).await.unwrap();
        assert_eq!(Some(again), get(&*store, "vpc-3").await.unwrap());
        assert_eq!(list(&*store).await.unwrap().len(), 10);

        let other = v1::Vpc { cidr: "10.1.0.0/17".into(), ..definition(3) };
        let error = create(&*store, other).await.unwrap_err();
        assert!(matches!(error, CreateVpcError::Exists(_)), "{error}");
        let same_address = v1::Vpc { name: "other".into(), ..definition(4) };
        let error = create(&*store, same_address).await.unwrap_err().to_string();
        assert!(error.contains("10.1.0.14 on eth1") && error.contains("vpc-4"), "{error}");
        let same_address = v1::Vpc { shared_address: "10.1.0.99".into(), ..definition(4) };
        let same_address = v1::Vpc { name: "other".into(), ..same_address };
        let error = create(&*store, same_address).await.unwrap_err().to_string();
        assert!(error.contains("2001:db8:1::14 on eth1") && error.contains("vpc-4"), "{error}");
    }
}
