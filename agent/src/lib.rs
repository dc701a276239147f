//! The first process of a Linux guest, and the only one that does not come from a function's image.
//!
//! It loads the drivers and stands at the release barrier: there the VMM takes the template's
//! snapshot, and there each clone begins. Then it applies the clone's identity, starts the function,
//! and carries HTTP from the VMM's vsock to the function's server.
//!
//! Nothing of a function has run at the barrier. What was random until then is the same in all clones
//! of a template: where the kernel and this process lie, and what guards their stacks and heap. What
//! is drawn later is not, and the agent does not ask for the kernel's `boot_id`, which is drawn when
//! it is read first.

pub mod barrier;
pub mod error;
pub mod function;
pub mod identity;
mod netlink;
pub mod network;
mod prefault;
mod prepare;
pub mod root;
pub mod serve;

use std::fmt::Display;
use std::io;
use std::path::Path;

use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::tcdrain;
use nix::unistd::{Pid, getpid, pause};

use self::barrier::Vmm;
use self::error::AgentError;
use self::network::Link;

/// Name of the interface that the VMM's network device becomes.
pub const INTERFACE: &str = "eth0";

/// Runs until the function ends or something fails, says which, and powers the machine off.
pub fn main() {
    if getpid() != Pid::from_raw(1) {
        say(
            "this is the first process of a Linux guest, which the VMM boots; it does nothing here",
        );
        std::process::exit(1);
    }
    match run() {
        Ok(end) => say(end),
        Err(error) => say(error),
    }
    // What it said is lost if the machine is off before the serial line has it.
    let _ = tcdrain(io::stderr());
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    say(format_args!("cannot power off: {error}"));
}

/// From the boot to the function's end: what that was.
fn run() -> Result<String, AgentError> {
    prepare::mounts()?;
    let vmm = Vmm::open()?;
    prepare::modules(Path::new(prepare::MODULES))?;
    prepare::limits()?;
    network::up("lo")?;
    prepare::interface(INTERFACE)?;
    let link = Link::open(INTERFACE)?;
    let listener = serve::listen()?;

    let identity = vmm.wait(|| prefault::run(&link));
    identity::apply(&identity, &link)?;
    vmm.ready();

    serve::start(listener)?;
    if !Path::new(root::DISK).exists() {
        say(format_args!("there is no {}, so no function runs", root::DISK));
        loop {
            pause();
        }
    }
    root::assemble(&identity)?;
    let function = function::start(Path::new(root::ROOT))?;
    let end = function::wait_for(function)?;
    Ok(format!("the function {end}"))
}

/// Tells the console.
fn say(what: impl Display) {
    eprintln!("warren-agent: {what}");
}
