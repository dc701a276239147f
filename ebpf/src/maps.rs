//! The maps. The loader sets their real sizes, and pins those of its role.

use core::hint::black_box;

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use warren_abi::flow::Timers;
use warren_abi::flowlog::level;
use warren_abi::fragment::{Cell, Datagram};
use warren_abi::maps::{
    BlockKey, CachedRoute, Claim, Drops, Flow, FlowCounts, Guard, Held, HostVpc, InFlow, InKey,
    InterfaceKey, Limits, Member, OutKey, Policy, ProxyVpc, Reached, Route, RouteKey, ServiceSlot,
    Slot, Underlay,
};
use warren_abi::services;
use warren_abi::wire::{Ip, Ipv4, Mac};

use crate::conntrack::Scratch;

/// The end of the tunnel here, written by the loader.
#[unsafe(no_mangle)]
static UNDERLAY: Global<Underlay> =
    Global::new(Underlay { ifindex: 0, address: Ip::UNSPECIFIED, inner_mtu: 0 });

/// How long flows may be idle, written by the loader.
#[unsafe(no_mangle)]
static TIMERS: Global<Timers> = Global::new(Timers::DEFAULT);
/// Which events of flows are told, of [`level`]; written by the loader.
#[unsafe(no_mangle)]
static FLOW_LOG: Global<u32> = Global::new(level::ENDS | level::STARTS);
/// Index of the link-local services' TUN device, written by the loader.
#[unsafe(no_mangle)]
static SERVICES: Global<u32> = Global::new(0);
/// Index of the device for fragments, written by the loader.
#[unsafe(no_mangle)]
static FRAGMENTS: Global<u32> = Global::new(0);

#[map]
pub static SLOTS: HashMap<u32, Slot> = HashMap::with_max_entries(1, 0);
#[map]
pub static HOST_VPCS: HashMap<u32, HostVpc> = HashMap::with_max_entries(1, 0);
// Entries made one by one lie in the kernel's large pages; those of a map that is filled in
// advance, in small ones, and each look-up then misses the TLB as well.
#[map]
pub static CT_OUT: HashMap<OutKey, Flow> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
// Not an LRU: it would evict one half of a flow without the other.
#[map]
pub static CT_IN: HashMap<InKey, InFlow> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static PROXY_VPCS: HashMap<u32, ProxyVpc> = HashMap::with_max_entries(1, 0);
#[map]
pub static PUBLIC: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);
#[map]
pub static PRIVATE: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);
#[map]
pub static INTERFACES: HashMap<InterfaceKey, u32> = HashMap::with_max_entries(1, 0);
#[map]
pub static BLOCKS: HashMap<BlockKey, Ip> = HashMap::with_max_entries(1, 0);
#[map]
pub static DROPS: PerCpuArray<Drops> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static ROUTES: LpmTrie<RouteKey, Route> = LpmTrie::with_max_entries(1, 0);
#[map]
pub static ROUTE_CACHE: PerCpuArray<CachedRoute> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static SERVICE_SLOTS: Array<ServiceSlot> = Array::with_max_entries(1, 0);
#[map]
pub static ANSWERS: Array<u64> = Array::with_max_entries(1, 0);
#[map]
pub static FLOW_EVENTS: RingBuf = RingBuf::with_byte_size(4096, 0);
#[map]
pub static FLOW_COUNTS: PerCpuArray<FlowCounts> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static POLICIES: Array<Policy> = Array::with_max_entries(1, 0);
#[map]
pub static RULE_HITS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static DATAGRAMS: LruHashMap<Cell, Datagram> = LruHashMap::with_max_entries(1, 0);
#[map]
pub static LIMITS: Array<Limits> = Array::with_max_entries(1, 0);
#[map]
pub static HELD: Array<Held> = Array::with_max_entries(1, 0);
#[map]
pub static REACHED: Array<Reached> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
pub static MEMBERS: HashMap<Member, u32> = HashMap::with_max_entries(1, 0);
#[map]
pub static CLAIMS: HashMap<u32, Claim> = HashMap::with_max_entries(1, 0);
#[map]
pub static HEARD: LruHashMap<Ip, u64> = LruHashMap::with_max_entries(1024, 0);

/// How far a migration is: [`warren_abi::maps::migration`].
#[map]
pub static MIGRATION: Array<u32> = Array::with_max_entries(1, 0);
/// Flows and mappings that were left to the former version.
#[map]
pub static PASSED: HashMap<OutKey, u32> = HashMap::with_max_entries(1, 0);

/// The end of the tunnel here. The verifier knows what is in it, and what cannot happen then.
pub struct End;

impl End {
    /// Its fields are read one by one: no program needs all.
    const FIELDS: *const Underlay = (&raw const UNDERLAY).cast();

    /// Index of the interface.
    #[inline(always)]
    pub fn ifindex() -> u32 {
        // SAFETY: a `Global` is what it holds, and nobody writes it; so below. Volatile, for the
        // compiler must not know what stands there before the loader has been.
        unsafe { (&raw const (*Self::FIELDS).ifindex).read_volatile() }
    }

    /// Largest IP packet that the tunnel carries, in bytes.
    #[inline(always)]
    pub fn inner_mtu() -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*Self::FIELDS).inner_mtu).read_volatile() }
    }

    /// Whether the underlay is of IPv6.
    #[inline(always)]
    pub fn is_v6() -> bool {
        // SAFETY: as above. No address of IPv6 that a host has begins with zeroes.
        unsafe { (&raw const (*Self::FIELDS).address.0[0]).read_volatile() != 0 }
    }

    /// Whether two ends of tunnels are the same.
    #[inline(always)]
    pub fn same(a: &Ip, b: &Ip) -> bool {
        if Self::is_v6() { a.is(*b) } else { a.0[3] == b.0[3] }
    }

    /// Own address.
    #[inline(always)]
    pub fn address() -> Ip {
        // SAFETY: as above.
        unsafe { (&raw const (*Self::FIELDS).address).read_volatile() }
    }

    /// Own address, where that is of IPv4.
    #[inline(always)]
    pub fn address_v4() -> Ipv4 {
        // SAFETY: as above.
        Ipv4(unsafe { (&raw const (*Self::FIELDS).address.0[3]).read_volatile() })
    }
}

/// How long flows may be idle.
#[inline(always)]
pub fn timers() -> &'static Timers {
    // SAFETY: a `Global` is what it holds, and nobody writes it. The compiler must not know what
    // stands there before the loader has been.
    unsafe { &*black_box((&raw const TIMERS).cast()) }
}

/// The slot of a TAP, and what it was attached to at one moment.
#[inline(always)]
pub fn uncached_slot(ifindex: u32) -> Option<Slot> {
    let entry = SLOTS.get_ptr(ifindex)?;
    // SAFETY: the verifier checked the pointer for null; map values stay readable to the end of
    // the program. Volatile, because an entry that is replaced may be recycled for another TAP
    // meanwhile: the attachment is read whole, and all before the index that tells of it.
    let (slot, found) = unsafe {
        let attachment = (&raw const (*entry).attachment).read_volatile();
        let slot = Slot { attachment, ifindex, ..entry.read_volatile() };
        (slot, (&raw const (*entry).ifindex).read_volatile())
    };
    if found == ifindex { Some(slot) } else { None }
}

/// Which events of flows are told, of [`level`].
#[inline(always)]
pub fn flow_log() -> u32 {
    FLOW_LOG.load()
}

/// Index of the link-local services' TUN device.
#[inline(always)]
pub fn services_ifindex() -> u32 {
    SERVICES.load()
}

/// Index of the device for fragments.
#[inline(always)]
pub fn fragments_ifindex() -> u32 {
    FRAGMENTS.load()
}

/// Whose flows in a VPC are those of an interface: a slot's, or the daemon's.
#[inline(always)]
pub fn slot_in(vni: u32, ifindex: u32) -> Option<Slot> {
    if ifindex == services_ifindex() { Some(daemon_in(vni)) } else { uncached_slot(ifindex) }
}

/// The daemon, as if it were a guest in a VPC.
#[inline(always)]
pub fn daemon_in(vni: u32) -> Slot {
    Slot {
        attachment: services::attachment_in(vni),
        ifindex: services_ifindex(),
        number: 0,
        address: services::address_in(vni),
        // Its device takes IP packets: the kernel takes the Ethernet header off.
        mac: Mac([0; 3]),
        guard: Guard::NONE,
        epoch: 0,
    }
}
