//! What a machine of the lab finds in its memory when it boots: two archives, one behind the other,
//! that the kernel unpacks. The first has the programs, the second what differs between kernels.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive;
use crate::build::{results, root};
use crate::command::output;
use crate::kernels::{Files, remove};

/// Modules that tests need; the kernel could not load them by itself.
const MODULES: [&str; 7] = ["kvm-amd", "tun", "vxlan", "veth", "bridge", "sch_ingress", "cls_bpf"];

/// Results of the build that tests look for beside themselves.
const RESULTS: [&str; 5] = [
    "warren-vmm",
    "warren-guest.elf",
    "warren-guest-hostile.elf",
    "warren-function-counter.elf",
    "warren-ebpf.o",
];

/// Programs of this machine that tests start.
const PROGRAMS: [&str; 2] = ["ip", "tc"];

/// Archives the programs that are run, each where it lies on this machine: tests have paths in them.
/// With them what all need, and `more` results of the build.
pub fn of_programs(
    folder: &Path,
    more: &[String],
    run: impl Iterator<Item = PathBuf>,
) -> Result<PathBuf> {
    let stage = folder.join("programs");
    remove(&stage)?;
    for name in ["dev", "proc", "sys", "tmp", "bin", "lab"] {
        fs::create_dir_all(stage.join(name))?;
    }
    fs::copy("/bin/busybox", stage.join("bin/busybox")).context("package busybox-static")?;
    fs::copy(root().join("tests/lab/init"), stage.join("init"))?;
    fs::set_permissions(stage.join("init"), Permissions::from_mode(0o755))?;
    let programs = PROGRAMS.iter().map(|name| on_path(name)).collect::<Result<Vec<_>>>()?;
    let mut libraries = BTreeSet::new();
    let more = more.iter().map(String::as_str);
    let results = RESULTS.into_iter().chain(more).map(|name| results().join(name));
    for path in results.chain(programs).chain(run) {
        let to = inside(&stage, &path)?;
        if path.extension().is_some() {
            // The kernel's and guests', which are read as files.
            fs::copy(&path, &to).with_context(|| format!("no {}", path.display()))?;
            continue;
        }
        archive::strip(&path, &to)?;
        let listed = output(Command::new("ldd").arg(&path))?;
        let paths = listed.split_whitespace().filter(|word| word.starts_with('/'));
        libraries.extend(paths.map(PathBuf::from));
    }
    for path in libraries {
        fs::copy(&path, inside(&stage, &path)?)?;
    }
    let archive = folder.join("programs.cpio");
    archive::pack(&stage, &archive)?;
    Ok(archive)
}

/// Archives a kernel's modules and the list of checks, behind the programs.
pub fn of_kernel(folder: &Path, programs: &Path, kernel: &Files, checks: &str) -> Result<PathBuf> {
    let stage = folder.join("image");
    remove(&stage)?;
    let list = archive::modules(kernel, &MODULES, &stage.join("lab/modules"))?;
    fs::write(stage.join("lab/modules.list"), list)?;
    fs::write(stage.join("lab/checks.list"), checks)?;
    let own = folder.join("own.cpio");
    archive::pack(&stage, &own)?;
    let image = folder.join("initrd");
    let mut file = File::create(&image)?;
    for part in [programs, &own] {
        io::copy(&mut File::open(part)?, &mut file)?;
    }
    Ok(image)
}

/// The place of a path in the archive, whose folder is made.
fn inside(stage: &Path, path: &Path) -> Result<PathBuf> {
    let path = stage.join(path.strip_prefix("/").unwrap_or(path));
    fs::create_dir_all(path.parent().unwrap_or(stage))?;
    Ok(path)
}

/// Where a program is.
pub fn on_path(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("there is no {name}: run `cargo xtask setup`"))
}
