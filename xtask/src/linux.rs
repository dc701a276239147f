//! `cargo xtask linux`: what Linux guests boot, and an image with a function for their tests.
//!
//! The kernels are Debian's, as they are. All that a guest needs besides is in the archive that it
//! boots with: the agent, and the drivers that the kernel does not have built in.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive;
use crate::build::{results, root, target};
use crate::command::{run, step};
use crate::kernels::{self, Files, KERNELS, Kernel, remove};

/// Drivers of the VMM's devices, and the file system that functions' roots are.
const MODULES: [&str; 7] = [
    "virtio_console",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "overlay",
    // Last: it finds the devices, and has all their drivers then.
    "virtio_mmio",
];

/// The test function's image.
const FUNCTION: &str = "linux-function.ext4";

/// Size of that, in MiB.
const FUNCTION_MIB: u32 = 8;

/// All that [`images`] makes, by its names in the folder of results.
pub fn names() -> Vec<String> {
    let of_kernel =
        |kernel: &Kernel| ["vmlinuz", "initrd"].map(|kind| format!("linux-{}.{kind}", kernel.name));
    let mut names: Vec<_> = KERNELS.iter().flat_map(of_kernel).collect();
    names.push(FUNCTION.into());
    names
}

/// Makes kernels and archives for guests, and the test function's image, of what was built. Kernels
/// that are not there are downloaded.
///
/// # Errors
/// A kernel cannot be had, or a program of [`crate::setup`] is missing.
pub fn images() -> Result<()> {
    kernels::can_be_had()?;
    for kernel in &KERNELS {
        step("linux", &format!("kernel {} and its initrd, for guests", kernel.name));
        let folder = target().join("lab").join(kernel.name);
        fs::create_dir_all(&folder)?;
        let files = kernel.files(&folder)?;
        let image = results().join(format!("linux-{}.vmlinuz", kernel.name));
        fs::copy(&files.image, &image).with_context(|| format!("no {}", image.display()))?;
        let initrd = results().join(format!("linux-{}.initrd", kernel.name));
        self::initrd(&folder.join("guest"), &files, &initrd)?;
    }
    step("linux", "image of the test function");
    function(&target().join("lab/function"), &results().join(FUNCTION))
}

fn initrd(stage: &Path, kernel: &Files, archive: &Path) -> Result<()> {
    remove(stage)?;
    let modules = stage.join("lib/modules");
    let list = archive::modules(kernel, &MODULES, &modules)?;
    fs::write(modules.join("list"), list)?;
    archive::strip(&results().join("warren-agent"), &stage.join("init"))?;
    archive::pack(stage, archive)
}

/// The function's folder with a busybox, as a file system.
fn function(stage: &Path, image: &Path) -> Result<()> {
    remove(stage)?;
    fs::create_dir_all(stage.join("bin"))?;
    fs::copy("/bin/busybox", stage.join("bin/busybox")).context("package busybox-static")?;
    let scripts = root().join("tests/lab/function");
    for script in ["function", "www/cgi-bin/echo", "www/cgi-bin/fetch", "www/cgi-bin/identity"] {
        let (from, to) = (scripts.join(script), stage.join(script));
        fs::create_dir_all(to.parent().unwrap_or(stage))?;
        fs::copy(&from, &to).with_context(|| format!("no {}", from.display()))?;
        fs::set_permissions(&to, Permissions::from_mode(0o755))?;
    }
    if image.exists() {
        fs::remove_file(image)?;
    }
    // Nobody writes to it: it needs no journal, and no blocks that are kept for root.
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0", "-d"]);
    run(command.arg(stage).arg(image).arg(format!("{FUNCTION_MIB}M")))
}
