//! What the devices of a microVM may move: options of `warren-vmm zygote`, and `warrend`'s
//! `[host.limits]`.

use std::num::NonZeroU64;

use clap::Args;
use serde::Deserialize;

use crate::devices::limiter::Limiter;

/// What the devices of one microVM may move per second, from its release on; without a rate as much
/// as comes. What comes in 100 ms may come at once after a pause.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Bytes per second of Ethernet frames to each microVM.
    #[arg(long, value_name = "BYTES")]
    pub net_receive_bytes: Option<NonZeroU64>,
    /// Frames per second to each microVM; of several that come as one segment, one.
    #[arg(long, value_name = "FRAMES")]
    pub net_receive_frames: Option<NonZeroU64>,
    /// Bytes per second of Ethernet frames from each microVM.
    #[arg(long, value_name = "BYTES")]
    pub net_transmit_bytes: Option<NonZeroU64>,
    /// Frames per second from each microVM; of several that come as one segment, one.
    #[arg(long, value_name = "FRAMES")]
    pub net_transmit_frames: Option<NonZeroU64>,
    /// Bytes per second that each microVM reads from its disk.
    #[arg(long, value_name = "BYTES")]
    pub disk_bytes: Option<NonZeroU64>,
    /// Requests per second to each microVM's disk.
    #[arg(long, value_name = "REQUESTS")]
    pub disk_requests: Option<NonZeroU64>,
}

impl Rates {
    /// All of them, each with the option of `warren-vmm zygote` that sets it.
    pub fn options(&self) -> [(&'static str, Option<NonZeroU64>); 6] {
        [
            ("--net-receive-bytes", self.net_receive_bytes),
            ("--net-receive-frames", self.net_receive_frames),
            ("--net-transmit-bytes", self.net_transmit_bytes),
            ("--net-transmit-frames", self.net_transmit_frames),
            ("--disk-bytes", self.disk_bytes),
            ("--disk-requests", self.disk_requests),
        ]
    }

    /// Of frames to the guest.
    pub(crate) fn net_receive(&self) -> Limiter {
        Limiter::of_rates(self.net_receive_bytes, self.net_receive_frames)
    }

    /// Of frames from the guest.
    pub(crate) fn net_transmit(&self) -> Limiter {
        Limiter::of_rates(self.net_transmit_bytes, self.net_transmit_frames)
    }

    /// Of the disk's requests.
    pub(crate) fn disk(&self) -> Limiter {
        Limiter::of_rates(self.disk_bytes, self.disk_requests)
    }
}
