//! Archives that a kernel unpacks as its first file system, and what goes into them.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::kernels::Files;

/// Archives a folder.
pub fn pack(stage: &Path, archive: &Path) -> Result<()> {
    let script = "find . | cpio --quiet --create --format newc --owner 0:0";
    let file = File::create(archive).with_context(|| format!("no {}", archive.display()))?;
    run(Command::new("sh").args(["-c", script]).current_dir(stage).stdout(file))
}

/// Puts modules, and what they depend on, into a folder as the kernel loads them: their file names, a
/// line each, in the order in which they are to be loaded.
pub fn modules(kernel: &Files, names: &[&str], folder: &Path) -> Result<String> {
    fs::create_dir_all(folder)?;
    let mut list = String::new();
    for path in kernel.modules(names)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = if let Some(name) = name.strip_suffix(".xz") {
            let module = File::create(folder.join(name))?;
            run(Command::new("xz").args(["--decompress", "--stdout"]).arg(&path).stdout(module))?;
            name
        } else {
            fs::copy(&path, folder.join(&name))?;
            &name
        };
        list += &format!("{name}\n");
    }
    Ok(list)
}

/// Copies a program without what is for debuggers, which is most of it.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(from))
}
