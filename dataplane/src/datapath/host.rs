//! A host's data path.

use std::collections::{BTreeMap, BTreeSet, HashMap as StdHashMap};
use std::fmt::{self, Debug, Formatter};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::MapData;
use rtnetlink::packet_route::link::InfoKind;
use warren_abi::flow::Timers;
use warren_abi::fragment::{Cell, DATAGRAMS, Datagram};
use warren_abi::maps::{self, Guard, Underlay, layouts, names, programs};
use warren_abi::wire::Ip;

use super::changes::{Changes, Table};
use super::counters::Counters;
use super::expedited::ExpeditedRcu;
use super::flow_events::{FlowCounters, FlowEvents, FlowTotals};
use super::limits::{self, SlotLimits};
use super::live::{self, Claims, LiveFlow, PortUse};
use super::migrate::Migration;
use super::netlink::{Interface, Netlink};
use super::owners::{self, Owners};
use super::pins::Pins;
use super::policy::{self, Policies};
use super::programs::{Globals, MapSpec, Programs};
use super::slots::{self, SlotTable};
use super::{
    Attachment, Carried, DropCount, Error, HostOptions, HostVpc, MAX_SLOTS, Policy, PolicyId,
    PortRange, Restrictions, Slot, SweepReport, Usage, check_address, check_vni, fragments, join,
    services, sweep, sysctl, tap, underlay,
};

/// Slots that maps have room for at least, so that a host can be given more without downtime.
const ROOM_FOR_SLOTS: u32 = 4096;

/// VPCs that a host can know.
const MAX_VPCS: u32 = 4096;

/// The data path of a host, open. All methods may be called from any thread.
///
/// Dropping it changes nothing: packets flow on.
pub struct HostDatapath {
    slots: Vec<Slot>,
    /// Indices in `slots`, by the TAP's.
    by_ifindex: StdHashMap<u32, usize>,
    services: Interface,
    fragments: String,
    underlay: Underlay,
    timers: Timers,
    state: Mutex<State>,
    counters: Counters,
    flows: MapData,
    claims: Claims,
    flow_counters: FlowCounters,
    flow_events: Mutex<Option<FlowEvents>>,
    /// Apart from the state: a sweep takes long, and attaching must not wait for it.
    programs: Mutex<Programs>,
}

struct State {
    slots: SlotTable,
    vpcs: Table<u32, maps::HostVpc>,
    /// The keys of `vpcs`: this process is the only one to write.
    vnis: BTreeSet<u32>,
    owners: Owners,
    policies: Policies,
    limits: SlotLimits,
}

impl Debug for HostDatapath {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostDatapath")
            .field("slots", &self.slots.len())
            .field("mtu", &self.mtu())
            .finish_non_exhaustive()
    }
}

impl HostDatapath {
    /// Makes the data path, or adopts the one that is there and replaces its programs, one by
    /// one, with no packet lost. Flows in maps of a former version's layout are carried over.
    ///
    /// An error leaves the former programs at their hooks, with their maps: traffic goes on.
    ///
    /// Interfaces are those of the calling thread's network namespace. Needs the capabilities
    /// `CAP_BPF` and `CAP_NET_ADMIN`, and the right to write `/proc/sys`.
    pub fn open(options: &HostOptions) -> Result<Self, Error> {
        check_options(options)?;
        let device = underlay::device_name(&options.interface_prefix)?;
        let mut netlink = Netlink::open()?;
        let underlay =
            underlay::find(&mut netlink, &options.underlay_interface, options.underlay_address)?;
        let mtu = underlay::inner_mtu(&underlay);

        let services = services::device_name(&options.interface_prefix)?;
        let services = services::open_device(&mut netlink, &services)?;

        let fragments = fragments::device_name(&options.interface_prefix)?;
        let fragments = fragments::open_device(&mut netlink, &fragments)?;

        let pins = Pins::open(&options.bpffs)?;
        // Beside traffic, only for what needs it: TAPs that are not there, programs to attach.
        let is_to_grow = pins.link_names()?.len() < options.slots as usize;
        let mut expedited = is_to_grow.then(ExpeditedRcu::new);
        // Each of them is in the kernel for a while.
        let (programs, made) = std::thread::scope(|scope| {
            let made = scope.spawn(|| slots::make(options, &mut netlink));
            (load(options, pins, &underlay, services.index, fragments.index), join(made))
        });
        let (mut programs, made) = (programs?, made?);
        let changes = Changes::open(&mut programs)?;
        let table = SlotTable::new(Table::open(&mut programs, names::SLOTS, &changes)?);
        let vpcs: Table<u32, maps::HostVpc> =
            Table::open(&mut programs, names::HOST_VPCS, &changes)?;
        let vnis = vpcs.keys().collect::<Result<_, _>>();
        let vnis = vnis.map_err(|source| Error::map(names::HOST_VPCS, source))?;
        let policies = Policies::open(&mut programs)?;
        let limits = SlotLimits::open(&mut programs)?;
        let owners = Owners::open(&mut programs, &changes)?;
        let mut state = State { slots: table, vpcs, vnis, owners, policies, limits };
        let counters = Counters::new(programs.map(names::DROPS)?);
        let flows = programs.data(names::CT_OUT)?;
        let claims = Claims::new(programs.map(names::CT_IN)?);
        let flow_counters = FlowCounters::new(&mut programs)?;
        let flow_events = Mutex::new(Some(FlowEvents::new(&mut programs)?));

        let migration = Migration::begin(&mut programs)?;
        expedited.get_or_insert_with(ExpeditedRcu::new);
        underlay::open_device(&mut netlink, &mut programs, programs::TUNNEL_HOST, &device, mtu)?;
        let slots =
            slots::open(options, &made, &mut netlink, &mut programs, &mut state.slots, mtu)?;
        let interface = &options.underlay_interface;
        programs.attach(programs::UNDERLAY_HOST, underlay::SHORT_CUT, interface)?;
        sysctl::hurry_neighbours(interface)?;
        let both = [programs::FRAGMENTS_FIRST, programs::FRAGMENTS_REST];
        fragments::connect(&mut netlink, &mut programs, &both, &fragments)?;
        services::connect(&mut netlink, &mut programs, &services, &slots, mtu)?;
        if let Some(migration) = migration {
            migration.complete(&programs)?;
        }
        programs.commit()?;
        let (state, programs) = (Mutex::new(state), Mutex::new(programs));
        let timers = options.timers;
        let by_ifindex = slots.iter().map(|slot| slot.ifindex).zip(0..).collect();
        Ok(Self {
            slots,
            by_ifindex,
            services,
            fragments: fragments.name,
            underlay,
            timers,
            state,
            counters,
            flows,
            claims,
            flow_counters,
            flow_events,
            programs,
        })
    }

    /// The slots, by number.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The slot whose TAP has this index.
    pub fn slot_of(&self, ifindex: u32) -> Option<&Slot> {
        self.slots.get(*self.by_ifindex.get(&ifindex)?)
    }

    /// Opens a slot's TAP for a VMM: non-blocking, virtio-net header of 12 bytes, no offloads.
    ///
    /// [`Error::System`] with `EBUSY` while another process has it open: the TAP has one queue, so
    /// that a former tenant's VMM cannot share it. A process that was forked meanwhile has it open
    /// until it executes its program: try again for a moment.
    pub fn open_tap(&self, slot: u32) -> Result<OwnedFd, Error> {
        let name = &self.slot(slot)?.ifname;
        let tap = tap::open(name)?;
        // A TAP that is opened has its carrier, but sends only when the kernel's link watch has
        // run, some time later. Asking for the link runs it now: the first packet is not lost.
        Netlink::open()?.interface(name)?;
        Ok(tap)
    }

    /// Largest IP packet of a guest, in bytes: the underlay's MTU less 50, or 70 where it is IPv6.
    pub fn mtu(&self) -> u16 {
        underlay::inner_mtu(&self.underlay)
    }

    /// Index of the underlay's interface, and the address that is this end of the tunnels.
    pub fn underlay(&self) -> (u32, IpAddr) {
        (self.underlay.ifindex, self.underlay.address.into())
    }

    /// Name of the TUN device of the link-local services: see [`crate::services`].
    pub fn services_device(&self) -> &str {
        &self.services.name
    }

    /// Name of the device for fragments: see [`crate::fragments`].
    pub fn fragments_device(&self) -> &str {
        &self.fragments
    }

    /// Makes a VPC known, or replaces what was known. Flows that began in a former port range go
    /// on.
    pub fn apply_vpc(&self, vpc: &HostVpc) -> Result<(), Error> {
        check_vni(vpc.vni)?;
        check_address("shared address", vpc.shared_address)?;
        if let Some(address) = vpc.shared_address_v6 {
            check_address("shared IPv6 address", address)?;
            underlay::check_mtu_v6(&self.underlay)?;
        }
        let proxies: BTreeSet<Ip> =
            vpc.proxies.iter().copied().chain([vpc.proxy_address]).map(Ip::from).collect();
        for proxy in &proxies {
            underlay::check_remote(&self.underlay, "proxy address", (*proxy).into())?;
        }
        vpc.ports.check()?;
        let value = maps::HostVpc {
            shared_address: vpc.shared_address.into(),
            port_base: u32::from(vpc.ports.base),
            port_count: vpc.ports.count,
            proxy_address: vpc.proxy_address.into(),
            shared_address_v6: vpc.shared_address_v6.map_or(Ip::UNSPECIFIED, Ip::from),
        };
        let mut state = self.lock();
        state.owners.set_proxies(vpc.vni, proxies)?;
        state.vpcs.insert(&vpc.vni, &value)?;
        state.vnis.insert(vpc.vni);
        Ok(())
    }

    /// Forgets a VPC; nothing if unknown. [`Error::VpcInUse`] while a slot is attached to it.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> {
        let mut state = self.lock();
        if let Some(slot) = state.slots.user_of(vni) {
            return Err(Error::VpcInUse { vni, slot });
        }
        state.vnis.remove(&vni);
        state.vpcs.remove(&vni)?;
        state.owners.set_proxies(vni, BTreeSet::new())
    }

    /// The VPCs that the programs know, in the order of their VNIs, with the proxies that own their
    /// addresses now.
    pub fn vpcs(&self) -> Result<Vec<HostVpc>, Error> {
        let state = self.lock();
        let mut vpcs = state
            .vpcs
            .iter()
            .map(|entry| {
                let (vni, vpc) = entry.map_err(|e| Error::map(names::HOST_VPCS, e))?;
                let owner = state.owners.owner(vni)?.unwrap_or(vpc.proxy_address);
                let others = state.owners.proxies(vni).filter(|proxy| *proxy != owner);
                Ok(HostVpc {
                    vni,
                    shared_address: vpc.shared_address.into(),
                    shared_address_v6: Some(vpc.shared_address_v6)
                        .filter(|address| !address.is_unspecified())
                        .map(Into::into),
                    ports: PortRange { base: vpc.port_base as u16, count: vpc.port_count },
                    proxy_address: owner.into(),
                    proxies: others.map(IpAddr::from).collect(),
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        vpcs.sort_unstable_by_key(|vpc| vpc.vni);
        Ok(vpcs)
    }

    /// Connects a slot to a VPC: two map writes. Returns the attachment's generation.
    ///
    /// What a former tenant's VMM wrote to the TAP was dealt with inside its `write`. So that
    /// nothing of it goes out as the new tenant's, attach only when that VMM has closed the TAP:
    /// when [`HostDatapath::open_tap`] succeeded again.
    pub fn attach(&self, slot: u32, vni: u32) -> Result<u32, Error> {
        self.attach_restricted(slot, vni, &Restrictions::default())
    }

    /// As [`HostDatapath::attach`], with restrictions in force from the first packet on.
    pub fn attach_restricted(
        &self,
        slot: u32,
        vni: u32,
        restrictions: &Restrictions,
    ) -> Result<u32, Error> {
        let mut state = self.lock();
        let attachment = state.slots.attachment(slot)?;
        let (current, generation) = (attachment.vni(), attachment.generation().wrapping_add(1));
        if current != 0 {
            return Err(Error::SlotInUse { slot, vni: current });
        }
        if !state.vnis.contains(&vni) {
            return Err(Error::UnknownVpc(vni));
        }
        state.restrict(slot, maps::Attachment::new(vni, generation), restrictions)?;
        Ok(generation)
    }

    /// Puts other restrictions in the place of those of an attached slot: its live flows are judged
    /// again, each at its next packet in either direction.
    pub fn restrict(&self, slot: u32, restrictions: &Restrictions) -> Result<(), Error> {
        let mut state = self.lock();
        let attachment = state.slots.attachment(slot)?;
        if attachment.vni() == 0 {
            return Err(Error::Detached(slot));
        }
        state.restrict(slot, attachment, restrictions)
    }

    /// Disconnects a slot: two map writes. Nothing if it is not attached.
    pub fn detach(&self, slot: u32) -> Result<(), Error> {
        let mut state = self.lock();
        let attachment = state.slots.attachment(slot)?;
        if attachment.vni() == 0 {
            return Ok(());
        }
        let detached = maps::Attachment::new(0, attachment.generation());
        state.slots.set(slot, detached, (Guard::NONE, 0))
    }

    /// What a slot holds of what it may be limited in; of a detached one, nothing.
    pub fn usage(&self, slot: u32) -> Result<Usage, Error> {
        let state = self.lock();
        let attachment = state.slots.attachment(slot)?;
        if attachment.vni() == 0 {
            return Ok(Usage::default());
        }
        state.limits.usage(slot, attachment.generation())
    }

    /// What a slot's TAP carried since it was made.
    pub fn carried(&self, slot: u32) -> Result<Carried, Error> {
        let ifindex = self.slot(slot)?.ifindex;
        Netlink::open()?.carried(ifindex)
    }

    /// The same of all slots, by their numbers.
    pub fn all_carried(&self) -> Result<StdHashMap<u32, Carried>, Error> {
        let all = Netlink::open()?.all_carried()?;
        let of_slot = |(index, carried)| Some((self.slot_of(index)?.number, carried));
        Ok(all.into_iter().filter_map(of_slot).collect())
    }

    /// Makes a policy that slots can be given. It never changes: what is to take its place is
    /// another one. A rule keeps its counter in another policy of its VPC.
    pub fn add_policy(&self, policy: &Policy) -> Result<PolicyId, Error> {
        self.lock().policies.add(policy)
    }

    /// Removes the policies that no slot has and that are not to be kept.
    pub fn retain_policies(&self, keep: &[PolicyId]) -> Result<(), Error> {
        let State { slots, policies, .. } = &mut *self.lock();
        let used: BTreeSet<u32> = slots.guards().map(|(_, epoch)| epoch).collect();
        policies.retain(|id| keep.contains(&id) || used.contains(&id.epoch()))
    }

    /// How often each rule of a VPC's policies decided: once for each flow that began, once for
    /// each that a change of rules met, and for each packet that was denied. [`OTHERWISE`] is what
    /// no rule was about.
    ///
    /// [`OTHERWISE`]: super::OTHERWISE
    pub fn rule_hits(&self, vni: u32) -> Result<BTreeMap<u32, u64>, Error> {
        self.lock().policies.hits(vni)
    }

    /// What a slot is attached to, read from the map.
    pub fn attachment(&self, slot: u32) -> Result<Option<Attachment>, Error> {
        let attachment = self.lock().slots.read(slot)?;
        let (vni, generation) = (attachment.vni(), attachment.generation());
        Ok((vni != 0).then_some(Attachment { vni, generation }))
    }

    /// Of a slot's attachment, or of the last one it had.
    pub fn generation(&self, slot: u32) -> Result<u32, Error> {
        Ok(self.lock().slots.attachment(slot)?.generation())
    }

    /// The counters that are not zero, by slot; 0 is of no slot.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> {
        let mut found = Vec::new();
        for scope in 0..=self.slots.len() as u32 {
            self.counters.read(scope, scope, &mut found)?;
        }
        Ok(found)
    }

    /// The flows and mappings in the table that are wanted, in no order.
    pub fn live_flows(
        &self,
        wanted: impl Fn(&maps::OutKey, &maps::Flow) -> bool,
    ) -> Result<Vec<LiveFlow>, Error> {
        live::find(&self.flows, wanted)
    }

    /// What the guest received in a flow; nothing if that is gone.
    pub fn received(&self, flow: &LiveFlow) -> maps::Traffic {
        self.claims.received(flow)
    }

    /// Who claimed a tuple on a VPC's shared address.
    pub fn claim(&self, claim: &maps::InKey) -> Option<maps::InFlow> {
        self.claims.get(claim)
    }

    /// How many ports are in use, by VPC and protocol: a pass through the whole table.
    pub fn port_use(&self) -> Result<Vec<PortUse>, Error> {
        live::port_use(&self.flows)
    }

    /// How long flows may be idle.
    pub fn timers(&self) -> &Timers {
        &self.timers
    }

    /// How many flows began and ended, and events of them that were lost.
    pub fn flow_totals(&self) -> Result<FlowTotals, Error> {
        self.flow_counters.read()
    }

    /// The events of flows, for one reader: none, if they were taken before.
    pub fn flow_events(&self) -> Option<FlowEvents> {
        self.flow_events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// How many flows are in the table, those included that ended since the last sweep.
    pub fn flows(&self) -> Result<u32, Error> {
        let mut count = 0;
        let visit = |key: &maps::OutKey, _: &_| count += u32::from(!key.is_mapping());
        sweep::for_each(self.flows.fd().as_fd(), visit)?;
        Ok(count)
    }

    /// Removes flows that ended, and whose ports rested: see [`HostOptions::timers`]. Call it every
    /// second or so, for they take room.
    pub fn sweep(&self) -> Result<SweepReport, Error> {
        self.sweep_with(&self.timers)
    }

    /// Removes flows that ended, with other time-outs.
    pub fn sweep_with(&self, timers: &Timers) -> Result<SweepReport, Error> {
        let attachments = self.lock().slots.attachments();
        let is_attached = |ifindex, attachment: maps::Attachment| {
            if ifindex == self.services.index {
                attachment == warren_abi::services::attachment_in(attachment.vni())
            } else {
                attachments.get(&ifindex) == Some(&attachment)
            }
        };
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        let program = programs.program(programs::SWEEP)?;
        sweep::run(program, self.flows.fd().as_fd(), is_attached, timers)
    }

    /// Removes everything that [`HostDatapath::open`] made, open or not: pins, TAPs, the VXLAN
    /// device. No error if nothing is there.
    pub fn uninstall(options: &HostOptions) -> Result<(), Error> {
        let device = underlay::device_name(&options.interface_prefix)?;
        let services = services::device_name(&options.interface_prefix)?;
        let fragments = fragments::device_name(&options.interface_prefix)?;
        let _expedited = ExpeditedRcu::new();
        Pins::remove_all(&options.bpffs)?;
        let mut netlink = Netlink::open()?;
        let mut interfaces = netlink.interfaces()?;
        interfaces.retain(|interface| match interface.kind {
            Some(InfoKind::Tun) => {
                interface.name == services
                    || interface.name == fragments
                    || slots::number_of(&options.interface_prefix, &interface.name).is_some()
            }
            Some(InfoKind::Vxlan) => interface.name == device,
            _ => false,
        });
        netlink.delete(&interfaces)
    }

    /// A slot.
    pub fn slot(&self, number: u32) -> Result<&Slot, Error> {
        let index = (number as usize).checked_sub(1).ok_or(Error::NoSlot(number))?;
        self.slots.get(index).ok_or(Error::NoSlot(number))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // All writes are single map writes: a panic leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes what a slot is attached to, and what is in force for it.
    fn restrict(
        &mut self,
        slot: u32,
        attachment: maps::Attachment,
        restrictions: &Restrictions,
    ) -> Result<(), Error> {
        let Restrictions { policy, limits } = restrictions;
        let (place, epoch) = match *policy {
            None => (0, 0),
            Some(id) if self.policies.contains(id) => (id.place(), id.epoch()),
            Some(_) => return Err(Error::UnknownPolicy(slot)),
        };
        self.limits.set(slot, limits)?;
        let guard = Guard::new(place, limits.concern_packets());
        self.slots.set(slot, attachment, (guard, epoch))
    }
}

/// The programs over their maps.
fn load(
    options: &HostOptions,
    pins: Pins,
    underlay: &Underlay,
    services: u32,
    fragments: u32,
) -> Result<Programs, Error> {
    let room = options.slots.max(ROOM_FOR_SLOTS);
    let (slots, count) = (options.slots, options.flows);
    let [policies, rule_hits] = policy::map_specs();
    let [limits, held] = limits::map_specs(room, slots);
    let [members, claims] = owners::map_specs(MAX_VPCS);
    let globals = Globals {
        underlay,
        services,
        fragments,
        timers: options.timers,
        flow_log: options.flow_log.events.bits(),
    };
    let maps = [
        MapSpec::new::<u32, maps::Slot>(names::SLOTS, room).at_least(slots),
        MapSpec::new::<u32, maps::HostVpc>(names::HOST_VPCS, MAX_VPCS).layout(layouts::HOST_VPCS),
        MapSpec::new::<maps::OutKey, maps::Flow>(names::CT_OUT, count).layout(layouts::CT_OUT),
        MapSpec::new::<maps::InKey, maps::InFlow>(names::CT_IN, count).layout(layouts::CT_IN),
        MapSpec::new::<u32, maps::Drops>(names::DROPS, room + 1)
            .layout(layouts::DROPS)
            .at_least(slots + 1),
        MapSpec::new::<u32, maps::ServiceSlot>(names::SERVICE_SLOTS, room + 1).at_least(slots + 1),
        MapSpec::new::<u32, u64>(names::ANSWERS, room + 1).at_least(slots + 1),
        MapSpec::new::<(), ()>(names::FLOW_EVENTS, options.flow_log.bytes),
        MapSpec::new::<u32, maps::FlowCounts>(names::FLOW_COUNTS, 1),
        policies,
        rule_hits,
        MapSpec::new::<Cell, Datagram>(names::DATAGRAMS, DATAGRAMS).layout(layouts::DATAGRAMS),
        limits,
        held,
        members,
        claims,
        Changes::map_spec(),
    ];
    Programs::load(&options.object, &globals, pins, &maps, &programs::OF_HOST)
}

fn check_options(options: &HostOptions) -> Result<(), Error> {
    check_address("underlay address", options.underlay_address)?;
    if options.slots == 0 || options.slots > MAX_SLOTS {
        return Err(Error::invalid("number of slots", options.slots, "give 1 to 65277"));
    }
    if options.flows == 0 || options.flows > 1 << 26 {
        return Err(Error::invalid("number of flows", options.flows, "give 1 to 67108864"));
    }
    let bytes = options.flow_log.bytes;
    if !(4096..=1 << 30).contains(&bytes) || !bytes.is_power_of_two() {
        let remedy = "give a power of two from 4096 to 1073741824";
        return Err(Error::invalid("size of the buffer of flow events", bytes, remedy));
    }
    Ok(())
}
