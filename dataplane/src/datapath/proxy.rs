//! A proxy's data path.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{self, Debug, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use aya::programs::TcAttachType;
use ipnetwork::{Ipv4Network, Ipv6Network};
use rtnetlink::packet_route::link::InfoKind;
use warren_abi::flow::Timers;
use warren_abi::fragment::{Cell, DATAGRAMS, Datagram};
use warren_abi::maps::{self, BlockKey, InterfaceKey, Underlay, layouts, names, programs};
use warren_abi::nat::{BLOCK_PORTS, block_of};
use warren_abi::wire::{Ip, Ipv4, Mac};

use super::changes::{Changes, Table};
use super::counters::Counters;
use super::expedited::ExpeditedRcu;
use super::netlink::{Interface, Netlink};
use super::pins::Pins;
use super::programs::{Globals, MapSpec, Programs};
use super::reached::ReachedVpcs;
use super::routes::{self, Entries, Routes};
use super::{
    Carried, DropCount, Error, PortRange, ProxyOptions, ProxyVpc, ProxyVpcV6, check_address,
    check_gateway_v6, check_vni, fragments, sysctl, underlay,
};
use crate::announce::Announcement;
use crate::clock::monotonic_ns;

/// VPCs that a proxy can serve.
const MAX_VPCS: u32 = 4096;

/// Blocks of ports, over all VPCs: a quarter of a million.
const MAX_BLOCKS: u32 = 1 << 18;

/// The data path of a proxy, open. All methods may be called from any thread.
///
/// Dropping it changes nothing: packets flow on.
pub struct ProxyDatapath {
    fragments: String,
    underlay: Underlay,
    heard: Table<Ip, u64>,
    reached: ReachedVpcs,
    state: Mutex<State>,
}

/// Where a VPC's interface is, and who can be asked there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the interface.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// The VPC's next hop.
    pub gateway: Option<Ipv4Addr>,
    /// Of what is noted about it.
    scope: u32,
}

/// The blocks of a VPC and who holds them, by shared address and block.
type Blocks = BTreeMap<(u32, u32), Ip>;

struct State {
    netlink: Netlink,
    programs: Programs,
    vpcs: Table<u32, maps::ProxyVpc>,
    interfaces: Table<InterfaceKey, u32>,
    /// VNIs of public addresses, by VPC; and the reverse.
    publics: Table<u32, u32>,
    privates: Table<u32, u32>,
    /// VNIs of the shared addresses on each interface, by its index.
    vnis: HashMap<u32, BTreeSet<u32>>,
    blocks: Table<BlockKey, Ip>,
    /// What is in there, by VNI: to look through all of them for one VPC's takes half a second.
    known_blocks: HashMap<u32, Blocks>,
    counters: Counters,
    routes: Routes,
}

impl Debug for ProxyDatapath {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProxyDatapath").finish_non_exhaustive()
    }
}

impl ProxyDatapath {
    /// Makes the data path, or adopts the one that is there and replaces its programs, one by
    /// one, with no packet lost.
    ///
    /// Interfaces are those of the calling thread's network namespace. Needs the capabilities
    /// `CAP_BPF` and `CAP_NET_ADMIN`, and the right to write `/proc/sys`.
    pub fn open(options: &ProxyOptions) -> Result<Self, Error> {
        check_address("underlay address", options.underlay_address)?;
        let device = underlay::device_name(&options.interface_prefix)?;
        let mut netlink = Netlink::open()?;
        let underlay =
            underlay::find(&mut netlink, &options.underlay_interface, options.underlay_address)?;
        let fragments = fragments::device_name(&options.interface_prefix)?;
        let fragments = fragments::open_device(&mut netlink, &fragments)?;
        let [routes, cache] = routes::map_specs();
        let mut programs = Programs::load(
            &options.object,
            &Globals {
                underlay: &underlay,
                services: 0,
                fragments: fragments.index,
                timers: Timers::DEFAULT,
                flow_log: 0,
            },
            Pins::open(&options.bpffs)?,
            &[
                routes,
                cache,
                vpcs_spec(),
                MapSpec::new::<InterfaceKey, u32>(names::INTERFACES, 3 * MAX_VPCS)
                    .layout(layouts::INTERFACES),
                MapSpec::new::<u32, u32>(names::PUBLIC, MAX_VPCS),
                MapSpec::new::<u32, u32>(names::PRIVATE, MAX_VPCS),
                MapSpec::new::<BlockKey, Ip>(names::BLOCKS, MAX_BLOCKS).layout(layouts::BLOCKS),
                MapSpec::new::<u32, maps::Drops>(names::DROPS, MAX_VPCS + 1).layout(layouts::DROPS),
                MapSpec::new::<u32, u64>(names::ANSWERS, MAX_VPCS + 1),
                MapSpec::new::<Cell, Datagram>(names::DATAGRAMS, DATAGRAMS)
                    .layout(layouts::DATAGRAMS),
                ReachedVpcs::map_spec(MAX_VPCS + 1),
                Changes::map_spec(),
            ],
            &programs::OF_PROXY,
        )?;
        let _expedited = ExpeditedRcu::new();
        underlay::open_device(
            &mut netlink,
            &mut programs,
            programs::TUNNEL_PROXY,
            &device,
            underlay::inner_mtu(&underlay),
        )?;
        let interface = &options.underlay_interface;
        programs.attach(programs::UNDERLAY_PROXY, underlay::SHORT_CUT, interface)?;
        sysctl::hurry_neighbours(interface)?;
        fragments::connect(&mut netlink, &mut programs, &[programs::FRAGMENTS_PROXY], &fragments)?;
        let changes = Changes::open(&mut programs)?;
        let vpcs: Table<u32, maps::ProxyVpc> =
            Table::open(&mut programs, names::PROXY_VPCS, &changes)?;
        let mut interfaces = Table::open(&mut programs, names::INTERFACES, &changes)?;
        let mut vnis = HashMap::<_, BTreeSet<_>>::new();
        for vpc in all_vpcs(vpcs.iter())? {
            // A former version's may be of another layout.
            enter(&mut interfaces, &vpc)?;
            vnis.entry(vpc.ifindex).or_default().insert(vpc.vni);
        }
        for link in programs.pins().link_names()? {
            for (prefix, _, program) in LINKS {
                if link.starts_with(prefix) {
                    // Where the interface is gone, the VPC waits to be applied again.
                    programs.replace(program, &link)?;
                }
            }
        }
        programs.commit()?;
        let heard = Table::open(&mut programs, names::HEARD, &changes)?;
        let reached = ReachedVpcs::open(&mut programs, MAX_VPCS + 1)?;
        let blocks = Table::open(&mut programs, names::BLOCKS, &changes)?;
        let state = State {
            netlink,
            vpcs,
            interfaces,
            publics: Table::open(&mut programs, names::PUBLIC, &changes)?,
            privates: Table::open(&mut programs, names::PRIVATE, &changes)?,
            vnis,
            known_blocks: known_blocks(&blocks)?,
            blocks,
            counters: Counters::new(programs.map(names::DROPS)?),
            routes: Routes::open(programs.map(names::ROUTES)?)?,
            programs,
        };
        let state = Mutex::new(state);
        Ok(Self { fragments: fragments.name, underlay, heard, reached, state })
    }

    /// Name of the device for fragments: see [`crate::fragments`].
    pub fn fragments_device(&self) -> &str {
        &self.fragments
    }

    /// Largest IP packet that the tunnel carries, in bytes.
    pub fn mtu(&self) -> u16 {
        underlay::inner_mtu(&self.underlay)
    }

    /// Makes a VPC known, or replaces what was known: blocks and routes that are not listed any
    /// more are removed, without a gap for those that are.
    pub fn apply_vpc(&self, vpc: &ProxyVpc) -> Result<(), Error> {
        check_vni(vpc.vni)?;
        check_address("shared address", vpc.shared_address)?;
        if let Some(gateway) = vpc.gateway {
            check_address("gateway", gateway)?;
        }
        if let Some(v6) = &vpc.v6 {
            check_address("shared IPv6 address", v6.shared_address)?;
            v6.gateway.map_or(Ok(()), check_gateway_v6)?;
            underlay::check_mtu_v6(&self.underlay)?;
        }
        vpc.public.map_or(Ok(()), check_vni)?;
        for (_, holder) in &vpc.holders {
            underlay::check_remote(&self.underlay, "holder of ports", *holder)?;
        }
        let blocks = blocks(vpc)?;
        let routes = routes::entries(vpc)?;
        let mut state = self.lock();
        let interface = state.netlink.interface(&vpc.interface)?;
        let Some(mac) = interface.mac else {
            let remedy = "give an Ethernet interface";
            return Err(Error::invalid("VPC interface", &vpc.interface, remedy));
        };
        let before = state.vpc(vpc.vni)?;
        for address in shared_addresses(vpc) {
            let key = InterfaceKey { ifindex: interface.index, address };
            if let Some(other) = state.interfaces.find(&key)?.filter(|other| *other != vpc.vni) {
                let value = format!("{}, which is of VNI {other}", IpAddr::from(address));
                let remedy = "give one that nobody has on that interface";
                return Err(Error::invalid("shared address", value, remedy));
            }
        }
        let scope = if let Some(before) = before {
            before.scope
        } else {
            let scope = state.free_scope()?;
            self.reached.clear(scope);
            scope
        };
        if let Some(before) = before.filter(|before| before.ifindex != interface.index) {
            state.leave_interface(&before)?;
        }

        state.set_blocks(vpc.vni, &blocks)?;
        let has_table = !routes.is_empty();
        if has_table {
            state.routes.set(vpc.vni, &routes)?;
        }
        state.set_public(vpc.vni, vpc.public)?;
        let siblings = before.map_or(0, |before| before.hairpins & maps::ProxyVpc::SIBLINGS);
        let public = vpc.public.map_or(0, |_| maps::ProxyVpc::PUBLIC);
        let value = maps::ProxyVpc {
            vni: vpc.vni,
            ifindex: interface.index,
            shared_address: vpc.shared_address.into(),
            network: vpc.cidr.network().into(),
            mask: vpc.cidr.mask().into(),
            gateway: vpc.gateway.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
            scope,
            mac: Mac::new(mac),
            standby: vpc.claim.is_none().into(),
            // Siblings are told right below.
            hairpins: siblings | public,
            claim: vpc.claim.or(before.map(|before| before.claim)).unwrap_or_default(),
            // After the table changed: what programs found in it until now is not used any more.
            table: if has_table { monotonic_ns() } else { 0 },
            v6: vpc.v6.as_ref().map_or(maps::ProxyVpcV6::NONE, |v6| maps::ProxyVpcV6 {
                shared_address: v6.shared_address.into(),
                network: v6.cidr.network().into(),
                mask: v6.cidr.mask().into(),
                gateway: v6.gateway.map_or(Ip::UNSPECIFIED, Ip::from),
            }),
        };
        state.vpcs.insert(&vpc.vni, &value)?;
        state.enter_addresses(before.as_ref(), &value)?;
        if !has_table {
            // Nobody looks there any more.
            state.routes.set(vpc.vni, &Entries::new())?;
        }
        state.enter_interface(vpc, &interface, before.as_ref())
    }

    /// Makes this proxy the owner of a VPC's addresses by a claim, or puts it on standby. Nothing if
    /// the VPC is unknown.
    pub fn set_claim(&self, vni: u32, claim: Option<u32>) -> Result<(), Error> {
        let mut state = self.lock();
        let Some(mut vpc) = state.vpc(vni)? else { return Ok(()) };
        vpc.standby = claim.is_none().into();
        vpc.claim = claim.unwrap_or(vpc.claim);
        state.vpcs.insert(&vni, &vpc)
    }

    /// Whether a VPC's interface is up, and somebody at its other end.
    pub fn has_carrier(&self, vni: u32) -> Result<bool, Error> {
        let mut state = self.lock();
        let Some(vpc) = state.vpc(vni)? else { return Ok(false) };
        let interface = state.netlink.interface_at(vpc.ifindex)?;
        Ok(interface.is_some_and(|interface| interface.is_up && interface.has_carrier))
    }

    /// Where a VPC is.
    pub fn place(&self, vni: u32) -> Result<Option<Place>, Error> {
        Ok(self.lock().vpc(vni)?.map(|vpc| Place {
            ifindex: vpc.ifindex,
            mac: vpc.mac.octets(),
            gateway: Some(vpc.gateway.into()).filter(|it: &Ipv4Addr| !it.is_unspecified()),
            scope: vpc.scope,
        }))
    }

    /// When something came from a VPC last, to its interface's MAC address, in nanoseconds of
    /// `CLOCK_MONOTONIC_COARSE`; 0: never.
    pub fn reached(&self, place: &Place) -> u64 {
        self.reached.at(place.scope)
    }

    /// Who answered last in a VPC who was asked for by ARP, and the MAC address of that one.
    pub fn neighbour(&self, place: &Place) -> Option<(Ipv4Addr, [u8; 6])> {
        self.reached.neighbour(place.scope)
    }

    /// The VNIs of the shared addresses on the interface of this index.
    pub fn vpcs_at(&self, ifindex: u32) -> Result<Vec<u32>, Error> {
        Ok(self.lock().vpcs_on(ifindex)?.iter().map(|vpc| vpc.vni).collect())
    }

    /// When each node of the underlay asked last whether this one forwards, in nanoseconds of
    /// `CLOCK_MONOTONIC`.
    pub fn heard(&self, node: IpAddr) -> Result<Option<u64>, Error> {
        self.heard.find(&node.into())
    }

    /// What the interfaces in VPCs carried since they were made, by their indices.
    pub fn carried(&self) -> Result<HashMap<u32, Carried>, Error> {
        let mut state = self.lock();
        let all = state.netlink.all_carried()?;
        Ok(all.into_iter().filter(|(link, _)| state.vnis.contains_key(link)).collect())
    }

    /// What is to be told to a VPC's neighbours: none while another proxy owns its addresses.
    pub fn announcement(&self, vni: u32) -> Result<Option<Announcement>, Error> {
        let vpc = self.lock().vpc(vni)?.filter(|vpc| vpc.standby == 0);
        Ok(vpc.map(|vpc| {
            let v6 = Some(vpc.v6.shared_address).filter(|address| !address.is_unspecified());
            let v4 = IpAddr::from(Ipv4Addr::from(vpc.shared_address));
            let addresses = [v4].into_iter().chain(v6.map(IpAddr::from)).collect();
            Announcement { ifindex: vpc.ifindex, mac: vpc.mac.octets(), addresses }
        }))
    }

    /// Forgets a VPC; nothing if unknown. Its interface is left up, without the shared address.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> {
        let mut state = self.lock();
        let Some(vpc) = state.vpc(vni)? else { return Ok(()) };
        state.leave_interface(&vpc)?;
        state.vpcs.remove(&vni)?;
        state.tell_siblings(vpc.ifindex)?;
        state.routes.set(vni, &Entries::new())?;
        state.set_public(vni, None)?;
        state.set_blocks(vni, &BTreeMap::new())
    }

    /// The VPCs that the programs know, in the order of their VNIs.
    pub fn vpcs(&self) -> Result<Vec<ProxyVpc>, Error> {
        let mut state = self.lock();
        let interfaces = state.netlink.interfaces()?;
        let mut vpcs = Vec::new();
        for vpc in state.all_vpcs()? {
            let name = interfaces
                .iter()
                .find(|interface| interface.index == vpc.ifindex)
                .map_or_else(String::new, |interface| interface.name.clone());
            let cidr = Ipv4Network::with_netmask(vpc.network.into(), vpc.mask.into());
            let mut vpc = ProxyVpc {
                vni: vpc.vni,
                interface: name,
                shared_address: vpc.shared_address.into(),
                cidr: cidr.map_err(|_| {
                    let remedy = "remove the VPC and apply it again";
                    Error::invalid("mask in the map", Ipv4Addr::from(vpc.mask), remedy)
                })?,
                gateway: Some(vpc.gateway.into())
                    .filter(|gateway: &Ipv4Addr| !gateway.is_unspecified()),
                v6: v6_of(&vpc.v6)?,
                holders: state.holders(vpc.vni),
                claim: (vpc.standby == 0).then_some(vpc.claim),
                routes: Vec::new(),
                public: state.publics.find(&vpc.vni)?,
            };
            vpc.routes = state.routes.of(&vpc);
            vpcs.push(vpc);
        }
        vpcs.sort_unstable_by_key(|vpc| vpc.vni);
        Ok(vpcs)
    }

    /// The counters that are not zero, by VNI; 0 is of no VPC. Those of a VPC go with it.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> {
        let state = self.lock();
        let mut found = Vec::new();
        state.counters.read(0, 0, &mut found)?;
        let mut vpcs = state.all_vpcs()?;
        vpcs.sort_unstable_by_key(|vpc| vpc.vni);
        for vpc in vpcs {
            state.counters.read(vpc.scope, vpc.vni, &mut found)?;
        }
        Ok(found)
    }

    /// Removes everything that [`ProxyDatapath::open`] and [`ProxyDatapath::apply_vpc`] made, open
    /// or not: pins, shared addresses, the VXLAN device. No error if nothing is there.
    pub fn uninstall(options: &ProxyOptions) -> Result<(), Error> {
        let device = underlay::device_name(&options.interface_prefix)?;
        let fragments = fragments::device_name(&options.interface_prefix)?;
        let _expedited = ExpeditedRcu::new();
        let mut netlink = Netlink::open()?;
        let mut interfaces = netlink.interfaces()?;
        for vpc in pinned_vpcs(&options.bpffs)? {
            let found = interfaces.iter().find(|interface| interface.index == vpc.ifindex);
            if let Some(interface) = found {
                for address in addresses(&vpc) {
                    netlink.remove_address(interface, address)?;
                }
            }
        }
        Pins::remove_all(&options.bpffs)?;
        interfaces.retain(|interface| match interface.kind {
            Some(InfoKind::Vxlan) => interface.name == device,
            Some(InfoKind::Tun) => interface.name == fragments,
            _ => false,
        });
        netlink.delete(&interfaces)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a panic leaves half done, the next application of the VPC completes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The links on VPCs' interfaces: what their names begin with, before the VNI by which the interface
/// was entered; where they are; their programs.
const LINKS: [(&str, TcAttachType, &str); 2] = [
    ("vpc-", TcAttachType::Ingress, programs::VPC),
    ("egress-", TcAttachType::Egress, programs::VPC_EGRESS),
];

impl State {
    fn all_vpcs(&self) -> Result<Vec<maps::ProxyVpc>, Error> {
        all_vpcs(self.vpcs.iter())
    }

    fn vpc(&self, vni: u32) -> Result<Option<maps::ProxyVpc>, Error> {
        self.vpcs.find(&vni)
    }

    /// The VPCs whose shared addresses are on an interface.
    fn vpcs_on(&self, ifindex: u32) -> Result<Vec<maps::ProxyVpc>, Error> {
        let vnis = self.vnis.get(&ifindex).into_iter().flatten();
        vnis.filter_map(|vni| self.vpc(*vni).transpose()).collect()
    }

    /// Has programs find a VPC by its interface and shared addresses.
    fn enter_addresses(
        &mut self,
        before: Option<&maps::ProxyVpc>,
        vpc: &maps::ProxyVpc,
    ) -> Result<(), Error> {
        self.vnis.entry(vpc.ifindex).or_default().insert(vpc.vni);
        enter(&mut self.interfaces, vpc)?;
        let present = keys(vpc);
        for key in before.into_iter().flat_map(keys).filter(|key| !present.contains(key)) {
            self.interfaces.remove(&key)?;
        }
        self.tell_siblings(vpc.ifindex)
    }

    /// Has each VPC on an interface know whether there are others.
    fn tell_siblings(&mut self, ifindex: u32) -> Result<(), Error> {
        let all = self.vpcs_on(ifindex)?;
        let siblings = if all.len() > 1 { maps::ProxyVpc::SIBLINGS } else { 0 };
        for vpc in all {
            let hairpins = vpc.hairpins & !maps::ProxyVpc::SIBLINGS | siblings;
            if hairpins != vpc.hairpins {
                self.vpcs.insert(&vpc.vni, &maps::ProxyVpc { hairpins, ..vpc })?;
            }
        }
        Ok(())
    }

    /// Has what has no route in a VPC leave by the address of another VNI, and what comes for that
    /// enter.
    fn set_public(&mut self, vni: u32, wanted: Option<u32>) -> Result<(), Error> {
        let present = self.publics.find(&vni)?;
        if present == wanted {
            return Ok(());
        }
        if let Some(public) = wanted {
            if let Some(other) = self.privates.find(&public)?.filter(|other| *other != vni) {
                let value = format!("{public}, which is that of VNI {other}");
                let remedy = "give each VPC a public address of its own";
                return Err(Error::invalid("VNI of the public address", value, remedy));
            }
            self.privates.insert(&public, &vni)?;
            self.publics.insert(&vni, &public)?;
        } else {
            self.publics.remove(&vni)?;
        }
        present.map_or(Ok(()), |public| self.privates.remove(&public))
    }

    /// A scope that no VPC has, its counters at zero.
    fn free_scope(&mut self) -> Result<u32, Error> {
        let taken: BTreeSet<u32> = self.all_vpcs()?.iter().map(|vpc| vpc.scope).collect();
        let Some(scope) = (1..=MAX_VPCS).find(|scope| !taken.contains(scope)) else {
            let remedy = "remove a VPC first, or use another proxy";
            return Err(Error::invalid("number of VPCs", MAX_VPCS, remedy));
        };
        self.counters.clear(scope)?;
        Ok(scope)
    }

    /// Prepares an interface in a VPC: program first, so that the kernel's own stack behind the
    /// shared addresses is out of reach; then those, from which the kernel asks for neighbours. For
    /// those that it probes, it wants a link-local address (RFC 4861, section 7.2.2).
    fn enter_interface(
        &mut self,
        vpc: &ProxyVpc,
        interface: &Interface,
        before: Option<&maps::ProxyVpc>,
    ) -> Result<(), Error> {
        // To set it takes longer than what is done for a VPC that is there.
        let is_new = before.is_none_or(|before| before.ifindex != interface.index);
        let _expedited = is_new.then(ExpeditedRcu::new);
        let mut siblings = self.vpcs_on(interface.index)?;
        siblings.retain(|sibling| sibling.vni != vpc.vni);
        let has_v6 = siblings.iter().any(|sibling| !sibling.v6.shared_address.is_unspecified());
        if vpc.v6.is_none() && !has_v6 {
            sysctl::disable_ipv6(&interface.name)?;
        }
        let entrant = self.interfaces.find(&any_at(interface.index))?.unwrap_or(vpc.vni);
        for (prefix, hook, program) in LINKS {
            let link = format!("{prefix}{entrant}");
            self.programs.attach_at(hook, program, &link, &interface.name)?;
        }
        let mut wanted = vec![IpAddr::from(vpc.shared_address)];
        if let (Some(v6), Some(mac)) = (&vpc.v6, interface.mac) {
            wanted.push(v6.shared_address.into());
            wanted.push(Ip::link_local(Mac::new(mac)).into());
        }
        let others: Vec<_> = siblings.iter().flat_map(addresses).collect();
        for address in before.map_or_else(Vec::new, addresses) {
            if !wanted.contains(&address) && !others.contains(&address) {
                self.netlink.remove_address(interface, address)?;
            }
        }
        let present = self.netlink.addresses(interface)?;
        let is_there = wanted.iter().all(|address| present.contains(address));
        if vpc.v6.is_some() && !has_v6 && !is_there {
            sysctl::reset_ipv6(&interface.name)?;
        }
        for address in wanted {
            self.netlink.add_address(interface, address)?;
        }
        sysctl::hurry_neighbours(&interface.name)?;
        self.netlink.set_up(&[interface], interface.mtu)
    }

    fn leave_interface(&mut self, vpc: &maps::ProxyVpc) -> Result<(), Error> {
        let _expedited = ExpeditedRcu::new();
        self.vnis.entry(vpc.ifindex).or_default().remove(&vpc.vni);
        let siblings = self.vpcs_on(vpc.ifindex)?;
        let others: Vec<_> = siblings.iter().flat_map(addresses).collect();
        let interfaces = self.netlink.interfaces()?;
        if let Some(interface) = interfaces.iter().find(|found| found.index == vpc.ifindex) {
            for address in addresses(vpc).iter().filter(|address| !others.contains(address)) {
                self.netlink.remove_address(interface, *address)?;
            }
        }
        // Any of this may be missing, if an earlier call got as far and no further.
        for key in keys(vpc) {
            self.interfaces.remove(&key)?;
        }
        let any = any_at(vpc.ifindex);
        if self.interfaces.find(&any)? != Some(vpc.vni) {
            return Ok(());
        }
        let pins = self.programs.pins();
        if let Some(heir) = siblings.first() {
            for (prefix, ..) in LINKS {
                let name = |vni| format!("{prefix}{vni}");
                pins.rename_link(&name(vpc.vni), &name(heir.vni))?;
            }
            self.interfaces.insert(&any, &heir.vni)
        } else {
            for (prefix, ..) in LINKS {
                pins.remove_link(&format!("{prefix}{}", vpc.vni))?;
            }
            self.interfaces.remove(&any)
        }
    }

    /// Makes `wanted` the blocks of a VPC: first those that are new or change hands, then away
    /// with the others.
    fn set_blocks(&mut self, vni: u32, wanted: &Blocks) -> Result<(), Error> {
        let key = |(shared_address, block): (u32, u32)| BlockKey {
            vni,
            shared_address: Ipv4(shared_address),
            block,
        };
        let known = self.known_blocks.entry(vni).or_default();
        for (place, holder) in wanted {
            if known.get(place) != Some(holder) {
                self.blocks.insert(&key(*place), holder)?;
                known.insert(*place, *holder);
            }
        }
        let unwanted: Vec<_> =
            known.keys().filter(|place| !wanted.contains_key(place)).copied().collect();
        for place in unwanted {
            self.blocks.remove(&key(place))?;
            known.remove(&place);
        }
        Ok(())
    }

    /// Who holds which ports of a VPC, adjacent blocks joined.
    fn holders(&self, vni: u32) -> Vec<(PortRange, IpAddr)> {
        let mut ranges: Vec<(PortRange, IpAddr)> = Vec::new();
        for ((_, block), holder) in self.known_blocks.get(&vni).into_iter().flatten() {
            let (base, holder) = (block * BLOCK_PORTS, IpAddr::from(*holder));
            match ranges.last_mut() {
                Some((range, last)) if *last == holder && range.end() == base => {
                    range.count += BLOCK_PORTS;
                }
                _ => ranges.push((PortRange { base: base as u16, count: BLOCK_PORTS }, holder)),
            }
        }
        ranges
    }
}

fn all_vpcs(
    entries: impl Iterator<Item = Result<(u32, maps::ProxyVpc), MapError>>,
) -> Result<Vec<maps::ProxyVpc>, Error> {
    entries
        .map(|entry| entry.map(|(_, vpc)| vpc))
        .collect::<Result<_, _>>()
        .map_err(|source| Error::map(names::PROXY_VPCS, source))
}

fn vpcs_spec() -> MapSpec {
    MapSpec::new::<u32, maps::ProxyVpc>(names::PROXY_VPCS, MAX_VPCS).layout(layouts::PROXY_VPCS)
}

/// Where programs look for whatever is for no shared address on an interface.
fn any_at(ifindex: u32) -> InterfaceKey {
    InterfaceKey { ifindex, address: Ip::UNSPECIFIED }
}

/// Where programs find a VPC by its shared addresses.
fn keys(vpc: &maps::ProxyVpc) -> Vec<InterfaceKey> {
    let v6 = Some(vpc.v6.shared_address).filter(|address| !address.is_unspecified());
    let all = [Ip::v4(vpc.shared_address)].into_iter().chain(v6);
    all.map(|address| InterfaceKey { ifindex: vpc.ifindex, address }).collect()
}

/// Has programs find a VPC, and what is for nobody on its interface be counted as its, unless that
/// is another's already.
fn enter(interfaces: &mut Table<InterfaceKey, u32>, vpc: &maps::ProxyVpc) -> Result<(), Error> {
    let any = Some(any_at(vpc.ifindex));
    let is_first = interfaces.find(&any_at(vpc.ifindex))?.is_none();
    for key in keys(vpc).into_iter().chain(any.filter(|_| is_first)) {
        interfaces.insert(&key, &vpc.vni)?;
    }
    Ok(())
}

fn shared_addresses(vpc: &ProxyVpc) -> impl Iterator<Item = Ip> {
    let v6 = vpc.v6.as_ref().map(|v6| v6.shared_address.into());
    [vpc.shared_address.into()].into_iter().chain(v6)
}

/// The addresses that a VPC's interface was given.
fn addresses(vpc: &maps::ProxyVpc) -> Vec<IpAddr> {
    let mut addresses = vec![Ipv4Addr::from(vpc.shared_address).into()];
    if !vpc.v6.shared_address.is_unspecified() {
        addresses.push(vpc.v6.shared_address.into());
        addresses.push(Ip::link_local(vpc.mac).into());
    }
    addresses
}

fn v6_of(vpc: &maps::ProxyVpcV6) -> Result<Option<ProxyVpcV6>, Error> {
    let address = |address: Ip| Some(address).filter(|it| !it.is_unspecified()).map(Ipv6Addr::from);
    let Some(shared_address) = address(vpc.shared_address) else { return Ok(None) };
    let mask = Ipv6Addr::from(vpc.mask);
    let cidr = Ipv6Network::with_netmask(vpc.network.into(), mask).map_err(|_| {
        Error::invalid("mask in the map", mask, "remove the VPC and apply it again")
    })?;
    Ok(Some(ProxyVpcV6 { shared_address, cidr, gateway: address(vpc.gateway) }))
}

/// The VPCs in a pinned map; none if there is no such map.
fn pinned_vpcs(directory: &std::path::Path) -> Result<Vec<maps::ProxyVpc>, Error> {
    let path = directory.join("maps").join(vpcs_spec().pin());
    if !path.exists() {
        return Ok(Vec::new());
    }
    let map = MapData::from_pin(&path)
        .and_then(|data| BpfHashMap::try_from(aya::maps::Map::HashMap(data)));
    let map = map.map_err(|source| Error::map(names::PROXY_VPCS, source))?;
    all_vpcs(map.iter())
}

/// The blocks that programs know of.
fn known_blocks(table: &Table<BlockKey, Ip>) -> Result<HashMap<u32, Blocks>, Error> {
    let mut known = HashMap::<u32, Blocks>::new();
    for entry in table.iter() {
        let (key, holder) = entry.map_err(|source| Error::map(names::BLOCKS, source))?;
        known.entry(key.vni).or_default().insert((key.shared_address.0, key.block), holder);
    }
    Ok(known)
}

fn blocks(vpc: &ProxyVpc) -> Result<Blocks, Error> {
    let shared = Ipv4::from(vpc.shared_address).0;
    let mut blocks = BTreeMap::new();
    for &(range, holder) in &vpc.holders {
        range.check()?;
        for block in block_of(range.base)..range.end() / BLOCK_PORTS {
            if blocks.insert((shared, block), holder.into()).is_some() {
                let ports = format!("{} ports from {}", range.count, range.base);
                return Err(Error::invalid("port range", ports, "give each block one holder"));
            }
        }
    }
    Ok(blocks)
}
