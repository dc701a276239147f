//! The interfaces in VPCs: where they are, and whether anybody is reached there.

use std::collections::BTreeMap;
use std::time::Instant;

use super::reach::Reach;
use crate::announce::Announcer;
use crate::datapath::{Error, Place, ProxyDatapath, ProxyVpc};

/// All of them.
#[derive(Default)]
pub struct Ways {
    /// By their indices.
    ways: BTreeMap<u32, Way>,
    /// The VNIs by which leaves what has no route in a VPC, by its own.
    publics: BTreeMap<u32, u32>,
}

/// An interface in a VPC.
struct Way {
    /// Of each of the VPC's shared addresses, by VNI.
    places: BTreeMap<u32, Place>,
    has_carrier: bool,
    reach: Reach,
}

impl Ways {
    /// Looks up the interface in a VPC, which the data path knows.
    ///
    /// # Errors
    /// If it cannot be looked up.
    pub fn find(
        &mut self,
        datapath: &ProxyDatapath,
        vpc: &ProxyVpc,
        now: Instant,
    ) -> Result<(), Error> {
        let vni = vpc.vni;
        match vpc.public {
            Some(public) => self.publics.insert(vni, public),
            None => self.publics.remove(&vni),
        };
        let Some(place) = datapath.place(vni)? else { return Ok(()) };
        let has_carrier = datapath.has_carrier(vni)?;
        let way = self.ways.entry(place.ifindex).or_insert_with(|| {
            let reach = Reach::new(datapath.reached(&place), now);
            Way { places: BTreeMap::new(), has_carrier, reach }
        });
        way.has_carrier = has_carrier;
        way.places.insert(vni, place);
        // It may have been at another one.
        self.ways.retain(|ifindex, way| {
            if *ifindex != place.ifindex {
                way.places.remove(&vni);
            }
            !way.places.is_empty()
        });
        Ok(())
    }

    /// Forgets a VPC.
    pub fn lose(&mut self, vni: u32) {
        self.publics.remove(&vni);
        self.ways.retain(|_, way| way.places.remove(&vni).is_none() || !way.places.is_empty());
    }

    /// The VNI by which leaves what has no route in a VPC.
    pub fn public_of(&self, vni: u32) -> Option<u32> {
        self.publics.get(&vni).copied()
    }

    /// The VPC that leaves by this VNI.
    pub fn private_of(&self, public: u32) -> Option<u32> {
        self.publics().find(|(_, other)| *other == public).map(|(vni, _)| vni)
    }

    /// A VPC, and its public address.
    pub fn with_public(&self, vni: u32) -> Vec<u32> {
        [vni].into_iter().chain(self.public_of(vni)).collect()
    }

    /// The VPCs that leave, and the VNIs by which they do.
    pub fn publics(&self) -> impl Iterator<Item = (u32, u32)> {
        self.publics.iter().map(|(vni, public)| (*vni, *public))
    }

    /// Whether a VPC is reached, and where it leaves, as far as is known.
    pub fn is_open(&self, vni: u32) -> bool {
        let way = |vni| self.ways.values().find(|way| way.places.contains_key(vni));
        let is_open = |vni| way(vni).is_none_or(Way::is_open);
        is_open(&vni) && self.publics.get(&vni).is_none_or(is_open)
    }

    /// This proxy begins to own a VPC's addresses: it is to find out soon whether it should.
    pub fn expect(&mut self, vni: u32, now: Instant) {
        let ways = self.ways.values_mut();
        ways.filter(|way| way.places.contains_key(&vni)).for_each(|way| way.reach.expect(now));
    }

    /// Notes whether a VPC's interface has a carrier. Whether that is something new.
    pub fn set_carrier(&mut self, vni: u32, is_there: bool) -> bool {
        let way = self.ways.values_mut().find(|way| way.places.contains_key(&vni));
        way.is_some_and(|way| std::mem::replace(&mut way.has_carrier, is_there) != is_there)
    }

    /// Finds out which VPCs are reached, and asks there who is to be asked. The VNIs of those of which
    /// something new is known.
    pub fn turn(
        &mut self,
        datapath: &ProxyDatapath,
        announcer: &Announcer,
        now: Instant,
    ) -> Vec<u32> {
        let mut changed = Vec::new();
        for way in self.ways.values_mut() {
            let was_reached = way.reach.is_reached();
            way.turn(datapath, announcer, now);
            if way.reach.is_reached() != was_reached {
                changed.extend(way.places.keys());
                let (vnis, is_reached) = (way.places.keys(), !was_reached);
                tracing::warn!(?vnis, is_reached, "whether a VPC can be reached changed");
            }
        }
        changed
    }
}

impl Way {
    /// When something came there last.
    fn heard(&self, datapath: &ProxyDatapath) -> u64 {
        self.places.values().map(|place| datapath.reached(place)).max().unwrap_or_default()
    }

    fn is_open(&self) -> bool {
        self.has_carrier && self.reach.is_reached()
    }

    /// Asks who is there, if that is due and there is somebody to be asked: by turns the neighbour that
    /// answered last, and the gateway.
    fn turn(&mut self, datapath: &ProxyDatapath, announcer: &Announcer, now: Instant) {
        let heard = self.heard(datapath);
        let Some(place) = self.places.values().next() else { return };
        let neighbour = self.places.values().find_map(|place| datapath.neighbour(place));
        let neighbour = neighbour.map(|(address, mac)| (address, Some(mac)));
        let gateway = place.gateway.map(|gateway| (gateway, None));
        let both = [neighbour.or(gateway), gateway.or(neighbour)];
        let asked = both[self.reach.asked() as usize % 2];
        if self.reach.turn(heard, asked.is_some(), now)
            && let Some((address, mac)) = asked
        {
            // What cannot be sent is not answered.
            announcer.ask((place.ifindex, place.mac), address, mac).ok();
        }
    }
}
