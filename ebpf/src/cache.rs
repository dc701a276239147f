//! What every packet looks up, kept per CPU: a hash map's look-up costs a tenth of a packet's way.
//!
//! A place holds what was found under a key, and in which state of the tables. Who changes a table
//! counts its changes up ([`names::CHANGES`](warren_abi::maps::names::CHANGES)) before they are
//! promised to anybody; what was found before is then not used any more.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use warren_abi::maps::{HostVpc, InterfaceKey, ProxyVpc, Slot};
use warren_abi::wire::Ip;

use crate::atomic;
use crate::maps::{BLOCKS, CLAIMS, HOST_VPCS, INTERFACES, PROXY_VPCS, uncached_slot};

/// Places for slots: powers of two, like all here. Those whose indices are alike take turns.
const SLOTS: u32 = 4096;
/// Places for VPCs.
const VPCS: u32 = 256;
/// Places for blocks of ports.
const HOLDERS: u32 = 4096;

#[map]
static CHANGES: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static SLOT_CACHE: PerCpuArray<Cached<u64, Slot>> = PerCpuArray::with_max_entries(SLOTS, 0);
#[map]
static HOST_VPC_CACHE: PerCpuArray<Cached<u64, HostVpc>> = PerCpuArray::with_max_entries(VPCS, 0);
#[map]
static PROXY_VPC_CACHE: PerCpuArray<Cached<u64, ProxyVpc>> = PerCpuArray::with_max_entries(VPCS, 0);
#[map]
static INTERFACE_CACHE: PerCpuArray<Cached<InterfaceKey, ProxyVpc>> =
    PerCpuArray::with_max_entries(VPCS, 0);
#[map]
static HOLDER_CACHE: PerCpuArray<Cached<u64, Ip>> = PerCpuArray::with_max_entries(HOLDERS, 0);

/// A place.
#[repr(C)]
struct Cached<K, V> {
    /// In which state the value was found, from 1; 0: nothing is here.
    state: u64,
    key: K,
    value: V,
}

/// The slot of a TAP, and what it was attached to at one moment.
///
/// Valid until another is asked for, which may take its place.
#[inline(always)]
pub fn slot(ifindex: u32) -> Option<&'static Slot> {
    get(&SLOT_CACHE, ifindex % SLOTS, u64::from(ifindex), |slot| {
        *slot = uncached_slot(ifindex)?;
        Some(())
    })
}

/// A VPC on a host, with the proxy that claimed its addresses last.
#[inline(always)]
pub fn host_vpc(vni: u32) -> Option<&'static HostVpc> {
    // SAFETY: they are copied at once; one that is replaced meanwhile is looked up again.
    get(&HOST_VPC_CACHE, vni % VPCS, u64::from(vni), |vpc| unsafe {
        *vpc = *HOST_VPCS.get(vni)?;
        if let Some(claim) = CLAIMS.get(vni) {
            vpc.proxy_address = claim.proxy;
        }
        Some(())
    })
}

/// Tells all who look something up here that a program changed a table.
#[inline(always)]
pub fn changed() {
    if let Some(count) = CHANGES.get_ptr_mut(0) {
        // SAFETY: the verifier checked the pointer for null; an array's entries stay.
        unsafe { atomic::add(count, 1) };
    }
}

/// A VPC on a proxy.
#[inline(always)]
pub fn proxy_vpc(vni: u32) -> Option<&'static ProxyVpc> {
    // SAFETY: as above.
    get(&PROXY_VPC_CACHE, vni % VPCS, u64::from(vni), |vpc| unsafe {
        *vpc = *PROXY_VPCS.get(vni)?;
        Some(())
    })
}

/// The VPC that a proxy's interface is in: with the shared address that this is, or else with any.
#[inline(always)]
pub fn vpc_at(ifindex: u32, address: Ip) -> Option<&'static ProxyVpc> {
    let Ip([a, b, c, d]) = address;
    let mixed = (a ^ b ^ c ^ d).wrapping_mul(0x9e37_79b1) >> 24;
    let key = InterfaceKey { ifindex, address };
    // SAFETY: as above.
    get(&INTERFACE_CACHE, (mixed ^ ifindex) % VPCS, key, |vpc| unsafe {
        let other = InterfaceKey { ifindex, address: Ip::UNSPECIFIED };
        *vpc = *PROXY_VPCS.get(INTERFACES.get(key).or_else(|| INTERFACES.get(other))?)?;
        Some(())
    })
}

/// The underlay address of the host that holds a block of ports.
#[inline(always)]
pub fn holder(block: warren_abi::maps::BlockKey) -> Option<&'static Ip> {
    let index = (block.vni.wrapping_mul(0x9e37_79b1) >> 20) ^ block.block;
    // The shared address is not in the key: a VPC has one in each state.
    let key = u64::from(block.vni) << 32 | u64::from(block.block);
    // SAFETY: as above.
    get(&HOLDER_CACHE, index % HOLDERS, key, |holder| unsafe {
        *holder = *BLOCKS.get(block)?;
        Some(())
    })
}

/// What is under a key: in its place, or else filled in from its table. No copy of it is on the
/// stack.
#[inline(always)]
fn get<K: PartialEq, V>(
    cache: &'static PerCpuArray<Cached<K, V>>,
    index: u32,
    key: K,
    fill: impl FnOnce(&mut V) -> Option<()>,
) -> Option<&'static V> {
    // SAFETY: the verifier checks pointers for null; an array's entries stay, and tc programs do
    // not interrupt one another on a CPU. The count is read before the table is.
    unsafe {
        let state = CHANGES.get_ptr(0)?.read_volatile() + 1;
        let place = &mut *cache.get_ptr_mut(index)?;
        if place.state != state || place.key != key {
            place.state = 0;
            fill(&mut place.value)?;
            place.key = key;
            place.state = state;
        }
        Some(&place.value)
    }
}
