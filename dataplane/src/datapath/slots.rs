//! The slots of a host: thousands of TAPs made, up and attached at once, and what each is connected
//! to.

use std::collections::HashMap as StdHashMap;

use rtnetlink::packet_route::link::InfoKind;
use warren_abi::maps::{self, Attachment, Guard, names, programs};
use warren_abi::wire;

use super::changes::Table;
use super::netlink::{Interface, Netlink};
use super::programs::Programs;
use super::{Error, HostOptions, Slot, sysctl, tap};

/// What the slots are connected to: a map, and this process's copy, which is as good, for no one
/// else writes.
pub(super) struct SlotTable {
    map: Table<u32, maps::Slot>,
    /// By the slot's number less 1.
    entries: Vec<maps::Slot>,
}

impl SlotTable {
    /// Without slots: [`open`] enters them.
    pub fn new(map: Table<u32, maps::Slot>) -> Self {
        Self { map, entries: Vec::new() }
    }

    /// What a slot is attached to, and since when.
    pub fn attachment(&self, slot: u32) -> Result<Attachment, Error> {
        Ok(self.entry(slot)?.attachment)
    }

    /// The same, read from the map.
    pub fn read(&self, slot: u32) -> Result<Attachment, Error> {
        Ok(self.map.get(&self.entry(slot)?.ifindex)?.attachment)
    }

    /// All attachments, by the index of the TAP.
    pub fn attachments(&self) -> StdHashMap<u32, Attachment> {
        self.entries.iter().map(|entry| (entry.ifindex, entry.attachment)).collect()
    }

    /// A slot that is attached to this VPC.
    pub fn user_of(&self, vni: u32) -> Option<u32> {
        let user = self.entries.iter().find(|entry| entry.attachment.vni() == vni);
        user.map(|entry| entry.number)
    }

    /// The map write that connects or disconnects a slot, or changes what guards it.
    pub fn set(
        &mut self,
        slot: u32,
        attachment: Attachment,
        (guard, epoch): (Guard, u32),
    ) -> Result<(), Error> {
        let entry = maps::Slot { attachment, guard, epoch, ..*self.entry(slot)? };
        self.write(&entry)?;
        self.entries[slot as usize - 1] = entry;
        Ok(())
    }

    /// What slots are guarded by, and under which epochs.
    pub fn guards(&self) -> impl Iterator<Item = (Guard, u32)> {
        self.entries.iter().map(|entry| (entry.guard, entry.epoch))
    }

    fn entry(&self, slot: u32) -> Result<&maps::Slot, Error> {
        let index = (slot as usize).checked_sub(1).ok_or(Error::NoSlot(slot))?;
        self.entries.get(index).ok_or(Error::NoSlot(slot))
    }

    fn write(&mut self, entry: &maps::Slot) -> Result<(), Error> {
        self.map.insert(&entry.ifindex, entry)
    }

    /// What the map holds, without the entries of TAPs that are gone, which are removed.
    fn known(
        &mut self,
        interfaces: &StdHashMap<String, Interface>,
    ) -> Result<StdHashMap<u32, maps::Slot>, Error> {
        let error = |source| Error::map(names::SLOTS, source);
        let known: Result<StdHashMap<_, _>, _> = self.map.iter().collect();
        let mut known = known.map_err(error)?;
        let mut gone: Vec<u32> = known.keys().copied().collect();
        let indices: std::collections::HashSet<_> = interfaces.values().map(|i| i.index).collect();
        gone.retain(|index| !indices.contains(index));
        for index in gone {
            known.remove(&index);
            self.map.remove(&index)?;
        }
        Ok(known)
    }

    /// Enters a slot. A TAP that was there keeps its attachment; a new one, whose index may have
    /// been another's, begins detached and under a new generation.
    fn enter(
        &mut self,
        number: u32,
        interface: &Interface,
        known: Option<&maps::Slot>,
        is_new: bool,
    ) -> Result<Slot, Error> {
        let address = wire::slot_address(number).ok_or(Error::NoSlot(number))?;
        let mac = wire::slot_mac(number);
        let (attachment, guard, epoch) = match known {
            Some(entry) if entry.number == number && !is_new => {
                (entry.attachment, entry.guard, entry.epoch)
            }
            Some(entry) => {
                let generation = entry.attachment.generation().wrapping_add(1);
                (Attachment::new(0, generation), Guard::NONE, 0)
            }
            None => (Attachment::new(0, 0), Guard::NONE, 0),
        };
        let entry = maps::Slot {
            attachment,
            ifindex: interface.index,
            number,
            address: address.into(),
            mac,
            guard,
            epoch,
        };
        if known != Some(&entry) {
            self.write(&entry)?;
        }
        self.entries.push(entry);
        Ok(Slot {
            number,
            ifname: interface.name.clone(),
            ifindex: interface.index,
            address,
            address_v6: wire::slot_address_v6(number).into(),
            mac: mac.octets(),
        })
    }
}

/// The number of the slot whose TAP has this name.
pub(super) fn number_of(prefix: &str, name: &str) -> Option<u32> {
    let digits = name.strip_prefix(prefix)?;
    let number = digits.parse().ok()?;
    (digits == u32::to_string(&number)).then_some(number)
}

/// Makes the TAPs that are missing, and tells of each slot whether its was.
pub(super) fn make(options: &HostOptions, netlink: &mut Netlink) -> Result<Vec<bool>, Error> {
    let interfaces = by_name(netlink)?;
    let make = |number| {
        let name = name(options, number);
        match interfaces.get(&name) {
            Some(interface) if interface.kind == Some(InfoKind::Tun) => Ok(false),
            Some(interface) => {
                let remedy = "remove the interface, or choose another prefix";
                Err(Error::invalid("kind of interface", &interface.name, remedy))
            }
            None => {
                tap::create(&name)?;
                sysctl::disable_ipv6(&name)?;
                Ok(true)
            }
        }
    };
    (1..=options.slots).map(make).collect()
}

/// Enters the slots, and attaches their program. `made` is what [`make`] returned.
pub(super) fn open(
    options: &HostOptions,
    made: &[bool],
    netlink: &mut Netlink,
    programs: &mut Programs,
    table: &mut SlotTable,
    mtu: u16,
) -> Result<Vec<Slot>, Error> {
    let interfaces = by_name(netlink)?;
    let known = table.known(&interfaces)?;
    let mut slots = Vec::with_capacity(options.slots as usize);
    let mut taps = Vec::with_capacity(options.slots as usize);
    for (number, &is_new) in (1..=options.slots).zip(made) {
        let name = name(options, number);
        let interface = interfaces.get(&name).ok_or(Error::NoInterface { name })?;
        let slot = table.enter(number, interface, known.get(&interface.index), is_new)?;
        programs.attach(programs::TAP, &format!("tap-{number}"), &interface.name)?;
        slots.push(slot);
        taps.push(interface);
    }
    netlink.set_up(&taps, u32::from(mtu))?;
    Ok(slots)
}

fn name(options: &HostOptions, number: u32) -> String {
    format!("{}{number}", options.interface_prefix)
}

fn by_name(netlink: &mut Netlink) -> Result<StdHashMap<String, Interface>, Error> {
    let interfaces = netlink.interfaces()?;
    Ok(interfaces.into_iter().map(|interface| (interface.name.clone(), interface)).collect())
}
