//! Programs that go on where another one ends, each with a stack of its own: what both families and
//! ICMP errors need of it together is more than the kernel allows.

use aya_ebpf::macros::map;
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::TcContext;
use warren_abi::drop::Drop;
use warren_abi::maps::tails;
pub use warren_abi::maps::tails::{
    ANSWER, ANSWER_V6, ERROR_TO_VPC, ERROR_TO_VPC_V6, FIRST_TO_GUEST_V6, FRAGMENTS_FIRST_V6,
    FRAGMENTS_PROXY_V6, FRAGMENTS_REST_V6, FRAGMENTS_TO_GUEST_V6, NODE, PUBLIC_IN, PUBLIC_IN_V6,
    PUBLIC_OUT, PUBLIC_OUT_V6, RESOLVE_V6, TAP_V6, TO_GUEST_V6, TRANSLATE_FIRST_V6, TRANSLATE_V6,
};

use crate::drops;

/// The programs, which the loader enters.
#[map]
static TAILS: ProgramArray = ProgramArray::with_max_entries(tails::COUNT, 0);

/// Goes on with one of [`tails`]; what this program has on its stack is gone.
#[inline(always)]
pub fn call(ctx: &TcContext, index: u32) -> i32 {
    // SAFETY: the program there is of this object, and of the same type.
    unsafe { TAILS.tail_call(ctx, index) };
    // It is not there.
    drops::verdict(ctx, 0, Err(Drop::Internal))
}
