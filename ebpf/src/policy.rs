//! Security groups: [`warren_abi::policy`] decides, over the policy of a slot.

use warren_abi::drop::Drop;
use warren_abi::maps::{Guard, OutKey};

use crate::maps::{POLICIES, RULE_HITS};

/// Whether the policy of a slot, which must be of this epoch, allows the flow. What decided counts.
#[inline(always)]
pub fn is_allowed(guard: Guard, epoch: u32, key: &OutKey) -> Result<bool, Drop> {
    let policy = POLICIES.get(guard.place()).ok_or(Drop::Internal)?;
    let decision = policy.decide(&key.peer, key.peer_port.get(), key.protocol as u8);
    // The place was another policy's meanwhile if the slot lost this one while the packet was on
    // its way.
    // SAFETY: it is a map value. Volatile, since it may have changed since the rules were read.
    if unsafe { (&raw const policy.epoch).read_volatile() } != epoch {
        return Err(Drop::Internal);
    }
    if let Some(hits) = RULE_HITS.get_ptr_mut(decision.counter) {
        // SAFETY: per-CPU, and tc programs do not interrupt one another on a CPU.
        unsafe { *hits += 1 };
    }
    Ok(decision.is_allowed)
}
