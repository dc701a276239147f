//! Ctrl-C for benchmarks that are not asynchronous: they end in good order, and what they made with
//! them.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// From now on SIGINT and SIGTERM end nothing: [`check`] tells of them.
pub fn catch() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler does nothing but one atomic store.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Fails once a signal came.
pub fn check() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::SeqCst), "interrupted; everything was removed again");
    Ok(())
}
