//! Takes the processor back from a guest that does not give it back.
//!
//! A one-shot timer raises a signal whose handler sets `immediate_exit` in the shared `kvm_run`
//! page, so that `KVM_RUN` returns with `EINTR` whether the signal came in it or just before it
//! (KVM API, 5: `immediate_exit`). A guest with interrupts waits within `KVM_RUN`, and is taken out
//! of it by what happens at descriptors, too: [`kick_on_input`].

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
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

/// Whether something happened at a descriptor since the guest last came out.
static INPUT: AtomicBool = AtomicBool::new(false);

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
        // System calls that the signal interrupts go on, but for those that wait.
        let flags = SaFlags::SA_RESTART;
        let action = SigAction::new(SigHandler::Handler(kick_for_input), flags, SigSet::empty());
        // SAFETY: as above.
        unsafe { sigaction(Signal::SIGIO, &action) }?;
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
        if INPUT.load(Ordering::SeqCst) {
            vcpu.set_kvm_immediate_exit(1);
        }
        self.timer.set(Expiration::OneShot(SLICE.into()), TimerSetTimeFlags::empty())
    }

    /// The guest came out: whatever happened at descriptors so far is about to be seen.
    pub fn kicked(vcpu: &mut VcpuFd) {
        vcpu.set_kvm_immediate_exit(0);
        INPUT.store(false, Ordering::SeqCst);
    }

    /// Makes sure that a kick will come within this time.
    pub fn hasten(&mut self, within: Duration) -> nix::Result<()> {
        ARMED.store(true, Ordering::SeqCst);
        let within = within.clamp(Duration::from_micros(1), SLICE);
        self.timer.set(Expiration::OneShot(within.into()), TimerSetTimeFlags::empty())
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // The page is about to be unmapped.
        IMMEDIATE_EXIT.store(ptr::null_mut(), Ordering::SeqCst);
        ARMED.store(false, Ordering::SeqCst);
    }
}

/// Has the guest kicked whenever something comes to a descriptor that takes `O_ASYNC`: a socket or a
/// TAP (`fcntl(2)`). The timer must have been made.
pub fn kick_on_input(fd: &impl AsRawFd) -> nix::Result<()> {
    let fd = fd.as_raw_fd();
    // SAFETY: these calls take numbers only.
    unsafe {
        Errno::result(libc::fcntl(fd, libc::F_SETOWN, libc::getpid()))?;
        let flags = Errno::result(libc::fcntl(fd, libc::F_GETFL))?;
        Errno::result(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC))?;
    }
    Ok(())
}

extern "C" fn kick_for_input(_: libc::c_int) {
    INPUT.store(true, Ordering::SeqCst);
    leave();
}

extern "C" fn kick(_: libc::c_int) {
    ARMED.store(false, Ordering::SeqCst);
    leave();
}

/// In a signal handler.
fn leave() {
    let immediate_exit = IMMEDIATE_EXIT.load(Ordering::SeqCst);
    if !immediate_exit.is_null() {
        // SAFETY: points into the `kvm_run` page, mapped for as long as the pointer is set. The
        // kernel reads this byte at any time, hence volatile.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
