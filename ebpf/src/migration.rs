//! While this version takes over the flows of a former one, whose maps have another layout.
//!
//! The former programs stay at their hooks, behind these. What these do not know, they leave to
//! the former ones, untouched, until the daemon has carried all flows over.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use warren_abi::drop::Drop;
use warren_abi::maps::{OutKey, migration};

use crate::maps::{MIGRATION, PASSED};

#[inline(always)]
fn mode() -> u32 {
    MIGRATION.get(0).copied().unwrap_or(migration::NONE)
}

/// Whether a former version has flows still.
#[inline(always)]
pub fn is_on() -> bool {
    mode() != migration::NONE
}

/// Whether a flow that is not known here is the former version's to begin, or may have been begun
/// there and not been carried over yet.
#[inline(always)]
pub fn is_formers(key: &OutKey) -> bool {
    let mode = mode();
    if mode == migration::NONE {
        return false;
    }
    let mapping = key.mapping();
    if mode == migration::PASS {
        // Full: if the next packet comes before the flow is carried over, it gets another port.
        let _ = PASSED.insert(key, 1, 0);
        let _ = PASSED.insert(mapping, 1, 0);
        return true;
    }
    // SAFETY: only whether there is an entry matters.
    unsafe { PASSED.get(key).is_some() || PASSED.get(mapping).is_some() }
}

/// Leaves what is not known here to the former version's program, the next at this hook.
#[inline(always)]
pub fn or_former<S: Copy>(result: Result<i32, (S, Drop)>) -> Result<i32, (S, Drop)> {
    match result {
        Err((_, Drop::NoFlow | Drop::IcmpError)) if is_on() => Ok(TC_ACT_UNSPEC),
        result => result,
    }
}
