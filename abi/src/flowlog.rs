//! What programs tell the daemon about flows: that one began, that one ended.
//!
//! Events go through a ring buffer that outlives the daemon. If it is full they are lost, and
//! counted; the packets go on.

use crate::maps::{OutKey, Traffic};
use crate::wire::Be16;

/// Declares [`What`] together with its names, so that neither can lack an entry.
macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// What happened to a flow or a mapping: it began, or why it ended. The discriminant is the
        /// index of its counter.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum What {
            $($(#[$doc])* $variant,)+
        }

        impl What {
            /// All of them, in the order of the discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name that people and programs know it by, such as `expired`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

events! {
    /// It began.
    Begun = "begun",
    /// It was idle for too long.
    Expired = "expired",
    /// Both sides closed it.
    Closed = "closed",
    /// The guest reset it, or the peer refused it.
    Reset = "reset",
    /// It was over, and another took its port before it was collected.
    TakenOver = "taken-over",
    /// Its slot was detached.
    Detached = "detached",
    /// Of a mapping: its host does not hold its port any more.
    Withdrawn = "withdrawn",
    /// The rules of its VPC changed, and its guest did not go on while it might again.
    Denied = "denied",
}

impl What {
    /// The one with this discriminant.
    pub fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(usize::from(index)).copied()
    }
}

/// Counters of flows, per CPU: more than there are kinds of events, so that pinned counters outlive
/// a new one. Mappings are not counted.
pub type FlowCounts = [u64; 32];

/// Index in [`FlowCounts`] of the events that were lost, those of mappings included.
pub const LOST: usize = 31;

const _: () = assert!(What::ALL.len() <= LOST);

/// Which events are told: bits of the programs' global `FLOW_LOG`.
pub mod level {
    /// None.
    pub const OFF: u32 = 0;
    /// Ends.
    pub const ENDS: u32 = 1;
    /// Beginnings. A mapping's is told with [`ENDS`], too: it says who has a port.
    pub const STARTS: u32 = 2;
}

/// One event.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// What the guest sent so far.
    pub sent: Traffic,
    /// What the guest received so far.
    pub received: Traffic,
    /// The flow; see [`OutKey::mapping`].
    pub key: OutKey,
    /// The VPC.
    pub vni: u32,
    /// The tick in which it began.
    pub began: u32,
    /// The tick of the last packet that kept it alive.
    pub last: u32,
    /// The port that stands for the guest's on the shared address.
    pub port: Be16,
    /// A [`What`].
    pub what: u8,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<FlowEvent>() == 88);

impl FlowEvent {
    /// From its bytes, as they lie in the ring buffer; none if there are more or fewer.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; size_of::<Self>()] = bytes.try_into().ok()?;
        // SAFETY: integers only: any bytes are a value.
        Some(unsafe { core::mem::transmute::<[u8; size_of::<Self>()], Self>(bytes) })
    }
}
