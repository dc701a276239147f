//! What comes before the barrier: file systems, drivers, the interface.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::net::if_::if_nametoindex;
use nix::sys::resource::{Resource, setrlimit};

use crate::error::{AgentError, system};
use crate::root::{Mount, mount_all};

/// Where the initrd has the modules, and a file `list` with their names in the order in which they
/// are to be loaded, a line each.
pub const MODULES: &str = "/lib/modules";

const MOUNTS: [Mount; 5] = [
    Mount::new("proc", "/proc", "proc", ""),
    Mount::new("sysfs", "/sys", "sysfs", ""),
    Mount::new("devtmpfs", "/dev", "devtmpfs", ""),
    Mount::new("tmpfs", "/run", "tmpfs", "mode=0755"),
    Mount::new("tmpfs", "/tmp", "tmpfs", "mode=1777"),
];

/// How many files the agent and what it starts may have open: each connection takes four.
const OPEN_FILES: u64 = 65536;

/// How long a driver may take from its loading until its interface is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// Mounts what the agent needs itself.
pub fn mounts() -> Result<(), AgentError> {
    mount_all(Path::new("/"), &MOUNTS)
}

/// Loads the modules.
pub fn modules(folder: &Path) -> Result<(), AgentError> {
    let list = folder.join("list");
    let names = fs::read_to_string(&list).map_err(system(list.display().to_string()))?;
    for name in names.lines() {
        let what = || format!("module {name}");
        let file = File::open(folder.join(name)).map_err(system(what()))?;
        match finit_module(file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(system(what())(error)),
        }
    }
    Ok(())
}

/// Raises the limits of this process, which all others inherit.
pub fn limits() -> Result<(), AgentError> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .map_err(system("the limit of open files"))
}

/// Waits until the interface is there.
pub fn interface(name: &str) -> Result<(), AgentError> {
    let deadline = Instant::now() + PATIENCE;
    while if_nametoindex(name).is_err() {
        if Instant::now() > deadline {
            return Err(AgentError::NoInterface { name: name.to_owned() });
        }
        thread::sleep(Duration::from_millis(1));
    }
    // An identity has no IPv6 address; the kernel would give itself one, and send solicitations.
    let switch = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if Path::new(&switch).exists() {
        fs::write(&switch, "1").map_err(system(switch))?;
    }
    Ok(())
}
