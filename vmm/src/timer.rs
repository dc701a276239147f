//! Takes the processor back from a guest that does not give it back.
//!
//! A one-shot timer raises a signal whose handler sets `immediate_exit` in the shared `kvm_run`
//! page, so that `KVM_RUN` returns with `EINTR` whether the signal came in it or just before it
//! (KVM API, 5: `immediate_exit`).

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use nix::sys::signal::{
    SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

/// How long a guest runs before sockets are served without its doing, at most.
const SLICE: Duration = Duration::from_millis(20);

/// `immediate_exit` of this process's only virtual processor.
static IMMEDIATE_EXIT: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

/// Whether the timer will raise the signal.
static ARMED: AtomicBool = AtomicBool::new(false);

/// The timer of this process's virtual processor.
pub struct KickTimer {
    timer: Timer,
}

impl KickTimer {
    /// Makes the timer. One processor per process: a second one takes the kicks over.
    pub fn new(vcpu: &mut VcpuFd) -> nix::Result<Self> {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.store(immediate_exit, Ordering::SeqCst);
        let action = SigAction::new(SigHandler::Handler(kick), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only touches atomics and the pointer below, as signal handlers may.
        unsafe { sigaction(Signal::SIGALRM, &action) }?;
        let event =
            SigEvent::new(SigevNotify::SigevSignal { signal: Signal::SIGALRM, si_value: 0 });
        Ok(Self { timer: Timer::new(ClockId::CLOCK_MONOTONIC, event)? })
    }

    /// Makes sure that a kick will come within a slice, and not at once for one that is over.
    pub fn arm(&mut self, vcpu: &mut VcpuFd) -> nix::Result<()> {
        if ARMED.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        // It came while the guest did not run.
        vcpu.set_kvm_immediate_exit(0);
        self.timer.set(Expiration::OneShot(SLICE.into()), TimerSetTimeFlags::empty())
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // The page is about to be unmapped.
        IMMEDIATE_EXIT.store(ptr::null_mut(), Ordering::SeqCst);
        ARMED.store(false, Ordering::SeqCst);
    }
}

extern "C" fn kick(_: libc::c_int) {
    ARMED.store(false, Ordering::SeqCst);
    let immediate_exit = IMMEDIATE_EXIT.load(Ordering::SeqCst);
    if !immediate_exit.is_null() {
        // SAFETY: points into the `kvm_run` page, mapped for as long as the pointer is set. The
        // kernel reads this byte at any time, hence volatile.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
