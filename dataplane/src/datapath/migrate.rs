//! Carrying flows over from maps of a former layout, with no packet lost and no flow broken.
//!
//! 1. The new programs go in front of the former ones, at all hooks. What they do not know, they
//!    leave to those, new flows included, and remember which.
//! 2. All flows are carried over. They are the new programs' from then on.
//! 3. One write to a map has the new programs begin flows, but for those that they left to the
//!    former ones; these are carried over last. No program knows a flow that another changes.
//! 4. The former programs and maps go.
//!
//! A daemon that dies in between leaves both at the hooks, and the next one begins with 1 again; an
//! error before 3 takes the new ones away.
//!
//! What the former programs count as dropped meanwhile is not carried over.

use std::path::Path;

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use warren_abi::flow::FlowState;
use warren_abi::maps::{self, Traffic, layouts, migration, names};
use warren_abi::wire::{Be16, Ip, Ipv4};

use super::Error;
use super::pins::Pins;
use super::programs::{MapSpec, Programs};

/// Flows that can be left to the former programs while this takes place.
pub(super) const PASSED: u32 = 1 << 16;

/// Pins of layout 1, that of the first release.
const OUT_V1: &str = names::CT_OUT;
const IN_V1: &str = names::CT_IN;

/// `OutKey` of layout 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct OutKeyV1 {
    ifindex: u32,
    generation: u32,
    peer: Ipv4,
    guest_port: Be16,
    peer_port: Be16,
    protocol: u32,
}

/// `Flow` of layout 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct FlowV1 {
    state: FlowState,
    vni: u32,
    port: Be16,
    reserved: u16,
}

/// `InKey` of layout 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct InKeyV1 {
    vni: u32,
    peer: Ipv4,
    peer_port: Be16,
    port: Be16,
    protocol: u32,
}

/// `InFlow` of layout 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct InFlowV1 {
    ifindex: u32,
    generation: u32,
    refreshed: u32,
    guest_port: Be16,
    reserved: u16,
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
pod!(OutKeyV1 = 20, FlowV1 = 16, InKeyV1 = 16, InFlowV1 = 16);

/// What stood for no peer is 0.0.0.0 in one layout, `::` in the other.
fn peer(peer: Ipv4) -> Ip {
    if peer == Ipv4(0) { Ip::UNSPECIFIED } else { Ip::v4(peer) }
}

fn out_from_v1(key: &OutKeyV1, flow: &FlowV1) -> (maps::OutKey, maps::Flow) {
    let OutKeyV1 { ifindex, generation, guest_port, peer_port, protocol, .. } = *key;
    let peer = peer(key.peer);
    let key = maps::OutKey { ifindex, generation, peer, guest_port, peer_port, protocol };
    let FlowV1 { state, vni, port, .. } = *flow;
    let state = if key.is_mapping() { state.of_mapping() } else { state };
    // It is counted when its guest next sends.
    let state = state.uncounted();
    let (check, began) = (key.check(), state.last_tick());
    let sent = Traffic::NONE;
    (key, maps::Flow { state, vni, port, check, sent, ends: [0; 2], began, judged: 0 })
}

fn in_from_v1(key: &InKeyV1, flow: &InFlowV1) -> (maps::InKey, maps::InFlow) {
    let InKeyV1 { vni, peer_port, port, protocol, .. } = *key;
    let key = maps::InKey { vni, peer: peer(key.peer), peer_port, port, protocol };
    let InFlowV1 { ifindex, generation, refreshed, guest_port, .. } = *flow;
    let (judged, received) = (0, Traffic::NONE);
    (key, maps::InFlow { ifindex, generation, refreshed, guest_port, judged, received })
}

/// Whether there are flows of a former layout. [`Error::IncompatibleMap`] if there is a map of a
/// later one.
pub(super) fn is_needed(pins: &Pins, specs: &[MapSpec]) -> Result<bool, Error> {
    let pinned = pins.map_names()?;
    for name in &pinned {
        let Some((map, layout)) = name.split_once("-v") else { continue };
        let newer = |spec: &MapSpec| {
            spec.name == map && layout.parse().is_ok_and(|layout: u32| layout > spec.layout)
        };
        if specs.iter().any(newer) {
            return Err(Error::IncompatibleMap { path: pins.maps().join(name) });
        }
    }
    let is_host = specs.iter().any(|spec| spec.name == names::CT_OUT);
    Ok(is_host && pinned.iter().any(|name| name == OUT_V1))
}

/// How many entries were carried over, and how many could not be, since there was another.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Carried {
    flows: u32,
    conflicts: u32,
}

/// Takes over from a former version, whose programs are behind these at all hooks.
pub(super) struct Migration {
    mode: Array<MapData, u32>,
}

impl Migration {
    /// The first step, before any program is at its hook.
    pub fn begin(programs: &mut Programs) -> Result<Option<Self>, Error> {
        if !programs.is_migrating() {
            return Ok(None);
        }
        let mut migration = Self { mode: programs.map(names::MIGRATION)? };
        migration.set(migration::PASS)?;
        Ok(Some(migration))
    }

    /// The other steps, when all programs are.
    pub fn complete(mut self, programs: &Programs) -> Result<(), Error> {
        let directory = programs.pins().maps();
        let first = carry_over(&directory)?;
        self.set(migration::BEGIN)?;
        settle();
        let last = carry_over(&directory).unwrap_or_else(|error| {
            // There is no way back: new flows are here.
            tracing::error!("flows that began during the upgrade are lost: {error}");
            Carried::default()
        });
        self.set(migration::NONE)?;
        tracing::info!(
            flows = first.flows + last.flows,
            conflicts = last.conflicts,
            "carried flows over from the layout of a former version"
        );
        Ok(())
    }

    fn set(&mut self, mode: u32) -> Result<(), Error> {
        self.mode.set(0, mode, 0).map_err(|source| Error::map(names::MIGRATION, source))
    }
}

/// Waits until every program that runs now has ended: a grace period of the kernel's RCU.
fn settle() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // SAFETY: the system call takes two integers, and changes nothing.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0) };
    if result != 0 {
        // Some kernels do not offer it; a program runs for microseconds.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Copies what is not there yet: first ports' claims, then flows, as programs insert them.
fn carry_over(directory: &Path) -> Result<Carried, Error> {
    let pin = |name, layout| directory.join(format!("{name}-v{layout}"));
    let claims = carry(
        (IN_V1, &directory.join(IN_V1)),
        &pin(names::CT_IN, layouts::CT_IN),
        in_from_v1,
        |former: &maps::InFlow, new| {
            (former.ifindex, former.generation, former.guest_port)
                == (new.ifindex, new.generation, new.guest_port)
        },
    )?;
    let flows = carry(
        (OUT_V1, &directory.join(OUT_V1)),
        &pin(names::CT_OUT, layouts::CT_OUT),
        out_from_v1,
        |former: &maps::Flow, new| former.port == new.port,
    )?;
    Ok(Carried { flows: flows.flows, conflicts: claims.conflicts + flows.conflicts })
}

/// Copies the entries of a map, converted, that the other does not have. One that it has and is
/// not the `same` is a conflict.
pub(super) fn carry<K: Pod, V: Pod, NewK: Pod, NewV: Pod>(
    (name, from): (&'static str, &Path),
    to: &Path,
    convert: impl Fn(&K, &V) -> (NewK, NewV),
    same: impl Fn(&NewV, &NewV) -> bool,
) -> Result<Carried, Error> {
    const NOEXIST: u64 = 1;
    let error = |source| Error::map(name, source);
    let open = |path| MapData::from_pin(path).map(Map::HashMap);
    let former = HashMap::<_, K, V>::try_from(open(from).map_err(error)?).map_err(error)?;
    let to = open(to).map_err(error)?;
    let mut to = HashMap::<_, NewK, NewV>::try_from(to).map_err(error)?;
    let mut carried = Carried::default();
    for entry in &former {
        let (key, value) = entry.map_err(error)?;
        let (key, value) = convert(&key, &value);
        match to.insert(key, value, NOEXIST) {
            Ok(()) => carried.flows += 1,
            Err(MapError::SyscallError(exists))
                if exists.io_error.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                let is_same = to.get(&key, 0).is_ok_and(|found| same(&value, &found));
                carried.conflicts += u32::from(!is_same);
            }
            Err(source) => return Err(error(source)),
        }
    }
    Ok(carried)
}
