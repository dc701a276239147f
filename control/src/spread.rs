//! Which of a VPC's shared addresses hosts hold ports of, and which proxies are to own them: settled
//! by hashing, so that one more or one less moves the fewest. Addresses are told by their VNIs.

/// A VPC's addresses, by their places, in the order in which a host's instances get them (rendezvous
/// hashing: the one that comes last is the first of as many hosts as any other).
pub fn of_host(vnis: &[u32], host: &str) -> Vec<usize> {
    let mut order: Vec<usize> = (0..vnis.len()).collect();
    order.sort_by_cached_key(|place| weight(vnis[*place], host));
    order
}

/// The proxies in the order in which they are to own each of a VPC's addresses. Each is the first for
/// as many, or for one more (consistent hashing with bounded loads,
/// <https://arxiv.org/abs/1608.01350>).
pub fn of_proxies<'a>(vnis: &[u32], proxies: &[&'a str]) -> Vec<Vec<&'a str>> {
    if proxies.is_empty() {
        return vec![Vec::new(); vnis.len()];
    }
    let (share, mut rest) = (vnis.len() / proxies.len(), vnis.len() % proxies.len());
    let mut loads = vec![0; proxies.len()];
    let order = |vni: &u32| {
        let mut order: Vec<usize> = (0..proxies.len()).collect();
        order.sort_by_cached_key(|proxy| weight(*vni, proxies[*proxy]));
        let has_room = |load| load < share || (load == share && rest > 0);
        let first = order.iter().position(|proxy| has_room(loads[*proxy])).unwrap_or_default();
        order[..=first].rotate_right(1);
        let load = &mut loads[order[0]];
        rest -= usize::from(*load == share);
        *load += 1;
        order.into_iter().map(|proxy| proxies[proxy]).collect()
    };
    vnis.iter().map(order).collect()
}

fn weight(vni: u32, name: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&vni.to_be_bytes()).update(name.as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hosts_are_spread_evenly_and_an_address_more_takes_its_share_of_each() {
        let firsts = |vnis: &[u32]| {
            let first = |host| vnis[of_host(vnis, &format!("host-{host}"))[0]];
            (0..3000).map(first).collect::<Vec<_>>()
        };
        let (three, four) = (firsts(&[4096, 4097, 4098]), firsts(&[4096, 4097, 4098, 5000]));
        let mut counts = BTreeMap::<u32, usize>::new();
        for (before, after) in three.iter().zip(&four) {
            assert!(before == after || *after == 5000, "none moves but to the new one");
            *counts.entry(*after).or_default() += 1;
        }
        assert!(counts.values().all(|count| (650..850).contains(count)), "{counts:?}");
    }

    #[test]
    fn vpcs_are_spread_over_proxies_and_one_that_goes_moves_only_its_own() {
        let mut firsts = BTreeMap::<&str, usize>::new();
        for vni in 4096..5096 {
            let of = |proxies: &[&'static str]| of_proxies(&[vni], proxies).remove(0);
            let mut all = of(&["p1", "p2", "p3", "p4"]);
            *firsts.entry(all[0]).or_default() += 1;
            all.retain(|name| *name != "p3");
            assert_eq!(all, of(&["p1", "p2", "p4"]));
        }
        assert!(firsts.values().all(|count| (200..300).contains(count)), "{firsts:?}");
    }

    proptest! {
        #[test]
        fn each_proxy_is_the_first_for_its_share(
            first in 1..10_000_000u32,
            addresses in 1..12usize,
            proxies in 1..12usize,
        ) {
            let vnis: Vec<u32> = (first..).take(addresses).collect();
            let names: Vec<_> = (0..proxies).map(|proxy| format!("p{proxy}")).collect();
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            let orders = of_proxies(&vnis, &names);
            let mut loads = names.iter().map(|name| {
                orders.iter().filter(|order| order[0] == *name).count()
            });
            let share = addresses / proxies..=addresses.div_ceil(proxies);
            prop_assert!(loads.all(|load| share.contains(&load)));
            for order in orders {
                let mut order = order.clone();
                order.sort_unstable();
                let mut all = names.clone();
                all.sort_unstable();
                prop_assert_eq!(order, all);
            }
        }
    }
}
