//! Where packets go in a VPC: the longest prefix of its route table, behind a cache of
//! destinations, since the look-up costs more than the rest of the packet.

use aya_ebpf::maps::lpm_trie::Key;
use warren_abi::drop::Drop;
use warren_abi::maps::{CachedRoute, ProxyVpc, Route, RouteKey};
use warren_abi::wire::Ip;

use crate::maps::{ROUTE_CACHE, ROUTES};

/// The next hop towards a destination.
#[inline(always)]
pub fn next_hop(vpc: &ProxyVpc, destination: Ip) -> Result<Ip, Drop> {
    let route = if vpc.table == 0 {
        Route::without_table(vpc, destination)
    } else {
        cached(vpc, destination)
    };
    match route.kind {
        Route::LOCAL => Ok(destination),
        Route::VIA => Ok(route.next_hop),
        Route::BLACKHOLE => Err(Drop::Blackhole),
        _ => Err(Drop::NoRoute),
    }
}

#[inline(always)]
fn cached(vpc: &ProxyVpc, destination: Ip) -> Route {
    let index = CachedRoute::index(vpc.vni, destination);
    let Some(place) = ROUTE_CACHE.get_ptr_mut(index) else { return look_up(vpc, destination) };
    // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
    let place = unsafe { &mut *place };
    if place.is_of(vpc, destination) {
        return place.route;
    }
    let route = look_up(vpc, destination);
    // What is found while the table changes is filed under the state before, and forgotten with it.
    *place = CachedRoute { table: vpc.table, vni: vpc.vni, destination, route };
    route
}

#[inline(always)]
fn look_up(vpc: &ProxyVpc, destination: Ip) -> Route {
    let key = Key::new(RouteKey::BITS, RouteKey { vni: vpc.vni, address: destination });
    match ROUTES.get(&key) {
        Some(route) => *route,
        None => Route::new(Route::NONE),
    }
}
