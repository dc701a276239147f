//! What was known of VPCs in a former layout: it is carried over before any program is replaced,
//! and nobody changes it meanwhile.

use std::path::Path;

use aya::Pod;
use warren_abi::maps::{self, BlockKey, ProxyVpcV6, names};
use warren_abi::wire::{Ip, Ipv4, Mac};

use super::Error;
use super::migrate::carry;
use super::programs::MapSpec;

/// `HostVpc` of layout 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct HostVpcV1 {
    shared_address: Ipv4,
    proxy_address: Ipv4,
    port_base: u32,
    port_count: u32,
}

/// `ProxyVpc` of layout 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProxyVpcV1 {
    vni: u32,
    ifindex: u32,
    shared_address: Ipv4,
    network: Ipv4,
    mask: Ipv4,
    gateway: Ipv4,
    scope: u32,
    mac: Mac,
    reserved: [u8; 6],
    table: u64,
}

macro_rules! pod {
    ($($name:ident = $size:literal),+) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size);
            // SAFETY: `repr(C)`, integers only, no padding (checked above): every byte of a value
            // is initialised, and any bytes are a value.
            unsafe impl Pod for $name {}
        )+
    };
}
pod!(HostVpcV1 = 16, ProxyVpcV1 = 48);

fn host_vpc(vpc: &HostVpcV1) -> maps::HostVpc {
    let HostVpcV1 { shared_address, proxy_address, port_base, port_count } = *vpc;
    let proxy_address = Ip::v4(proxy_address);
    let shared_address_v6 = Ip::UNSPECIFIED;
    maps::HostVpc { shared_address, port_base, port_count, proxy_address, shared_address_v6 }
}

fn proxy_vpc(vpc: &ProxyVpcV1) -> maps::ProxyVpc {
    let ProxyVpcV1 { vni, ifindex, shared_address, network, mask, gateway, scope, mac, .. } = *vpc;
    maps::ProxyVpc {
        vni,
        ifindex,
        shared_address,
        network,
        mask,
        gateway,
        scope,
        mac,
        standby: 0,
        hairpins: 0,
        claim: 0,
        table: vpc.table,
        v6: ProxyVpcV6::NONE,
    }
}

/// Fills those of the maps that are pinned in layout 1 as well.
pub(super) fn carry_over(directory: &Path, specs: &[MapSpec]) -> Result<(), Error> {
    for spec in specs {
        let former = directory.join(spec.name);
        if spec.layout == 1 || !former.exists() {
            continue;
        }
        let (from, to) = ((spec.name, former.as_path()), directory.join(spec.pin()));
        match spec.name {
            names::HOST_VPCS => {
                carry(from, &to, |vni: &u32, vpc| (*vni, host_vpc(vpc)), PartialEq::eq)?;
            }
            names::PROXY_VPCS => {
                carry(from, &to, |key: &u32, vpc| (*key, proxy_vpc(vpc)), PartialEq::eq)?;
            }
            names::BLOCKS => {
                let convert = |key: &BlockKey, host: &Ipv4| (*key, Ip::v4(*host));
                carry(from, &to, convert, PartialEq::eq)?;
            }
            // Flows, whose programs go on meanwhile: `migrate`. Counters begin anew.
            _ => {}
        }
    }
    Ok(())
}
