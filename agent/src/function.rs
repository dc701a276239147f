//! The function's process.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, chdir, chroot, setsid};
use warren_abi::microvm::{FUNCTION_PROGRAM, HTTP_PORT};

use crate::error::{AgentError, system};

/// Where a function's output goes: to the first of these that is there. The second is the kernel's,
/// which a serial line carries byte by byte.
const CONSOLES: [&str; 2] = ["/dev/hvc0", "/dev/console"];

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Starts the function in its root.
///
/// It is root there, and could leave: the wall around it is the microVM's.
///
/// # Errors
/// There is no such program in the image, or the kernel refuses.
pub fn start(root: &Path) -> Result<Pid, AgentError> {
    let output = console()?;
    let errors = output.try_clone().map_err(system("console"))?;
    let mut command = Command::new(FUNCTION_PROGRAM);
    command.env_clear().env("PATH", PATH).env("HOME", "/root").env("PORT", HTTP_PORT.to_string());
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let root = root.to_owned();
    let enter = move || -> io::Result<()> {
        chroot(&root)?;
        chdir("/")?;
        setsid()?;
        Ok(())
    };
    // SAFETY: makes system calls only; what they need was allocated before.
    unsafe { command.pre_exec(enter) };
    let what = format!("the function's program, {FUNCTION_PROGRAM} in its image");
    let child = command.spawn().map_err(system(what))?;
    Ok(Pid::from_raw(child.id() as i32))
}

/// Reaps processes until this one ends: how it did.
///
/// # Errors
/// It is none of this process's.
pub fn wait_for(function: Pid) -> Result<String, AgentError> {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, status)) if pid == function => {
                return Ok(format!("exited with status {status}"));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == function => {
                return Ok(format!("was ended by {signal}"));
            }
            // Whose parent ended before it, and who became this one's.
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(system("the function's end")(error)),
        }
    }
}

fn console() -> Result<File, AgentError> {
    let path = CONSOLES.into_iter().find(|path| Path::new(path).exists()).unwrap_or(CONSOLES[1]);
    File::options().write(true).open(path).map_err(system(path))
}
