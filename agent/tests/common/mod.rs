//! What the tests share.

use std::panic;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use warren_abi::microvm::Identity;

/// Runs this in namespaces of its own, which end with it: of mounts, of the network, of host names.
pub fn apart(run: impl FnOnce() + Send + 'static) {
    let isolated = move || {
        let namespaces =
            CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
        unshare(namespaces).expect("namespaces: these tests run as root");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        run();
    };
    if let Err(panic) = thread::spawn(isolated).join() {
        panic::resume_unwind(panic);
    }
}

pub fn identity() -> Identity {
    let mut hostname = [0; 64];
    hostname[..7].copy_from_slice(b"clone-7");
    Identity {
        wall_clock_ns: 1_700_000_000_000_000_000,
        tsc: 0,
        tsc_hz: 3_000_000_000,
        entropy: [0; 64],
        instance_id: 0x0123_4567_89ab_4def_8123_4567_89ab_cdef_u128.to_be_bytes(),
        hostname,
        ipv4: [10, 1, 0, 7],
        gateway: [169, 254, 1, 1],
        mac: [2, 0x11, 0x22, 0x33, 0x44, 0x55],
        mtu: 1400,
    }
}
