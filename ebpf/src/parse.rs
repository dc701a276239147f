//! Reading packets.

use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::family::Family;
use warren_abi::flow::Direction;
use warren_abi::packet::Frame;
pub use warren_abi::packet::{IP, Packet, l4};
use warren_abi::wire::{Be16, Ethernet};

/// A pointer into the packet, if all of `T` is there. Any helper that changes the packet makes it
/// invalid, and the verifier rejects its use from then on.
#[inline(always)]
pub fn at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() { None } else { Some(start as *mut T) }
}

/// Makes the headers directly readable, where the kernel left them in fragments.
///
/// Refuses a frame with a VLAN tag: the kernel took the tag out of sight, and would put it back in
/// front of whatever leaves.
#[inline(always)]
pub fn prepare<F: Family>(ctx: &TcContext) -> Result<(), Drop> {
    // SAFETY: the context is the kernel's for as long as the program runs.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Err(Drop::NotIpv4);
    }
    // Ethernet, IP and TCP headers.
    pull(ctx, l4::<F>() as u32 + 20);
    Ok(())
}

/// Makes the first `length` bytes directly readable, as far as there are so many.
#[inline(always)]
pub fn pull(ctx: &TcContext, length: u32) {
    if ctx.data() + length as usize > ctx.data_end() {
        // A failure is met again as a missing header.
        let _ = ctx.pull_data(if ctx.len() < length { ctx.len() } else { length });
    }
}

/// What the Ethernet header says of what follows it.
#[inline(always)]
pub fn ethertype(ctx: &TcContext) -> Be16 {
    // SAFETY: the context is the kernel's for as long as the program runs.
    Be16(unsafe { (*ctx.skb.skb).protocol } as u16)
}

/// The Ethernet header.
#[inline(always)]
pub fn ethernet(ctx: &TcContext) -> Result<Ethernet, Drop> {
    let header = at::<Ethernet>(ctx, 0).ok_or(Drop::Truncated)?;
    // SAFETY: `at` checked the bounds; every bit pattern is a value.
    Ok(unsafe { *header })
}

/// A program's frame.
struct Skb<'a>(&'a TcContext);

// SAFETY: `at` checked the bounds; the kernel aligns IP headers to 4 bytes, and Ethernet's to 2.
unsafe impl Frame for Skb<'_> {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*const T> {
        at::<T>(self.0, offset).map(<*mut T>::cast_const)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }

    /// The count of segments is not looked at: it is 0 for what came through a TAP.
    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: the context is the kernel's for as long as the program runs.
        unsafe { (*self.0.skb.skb).gso_size }
    }
}

/// The packet behind an Ethernet header, which said that it is of this family.
#[inline(always)]
pub fn packet<F: Family>(ctx: &TcContext, direction: Direction) -> Result<Packet<F>, Drop> {
    Packet::read(&Skb(ctx), direction)
}
