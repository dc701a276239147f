//! The kernels of the lab and of Linux guests: Debian's packages, unpacked below `target/lab` and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{output, run, step};

/// A kernel that Debian has.
pub struct Kernel {
    /// Its version, and what it is picked by.
    pub name: &'static str,
    /// Debian's release that has it.
    suite: &'static str,
}

/// Debian's cloud kernels, with KVM and all network modules that are needed: the first has no tcx, the
/// other has.
pub const KERNELS: [Kernel; 2] =
    [Kernel { name: "6.1", suite: "bookworm" }, Kernel { name: "6.12", suite: "trixie" }];

/// The package that depends on the current one.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Debian's keys, of the package `debian-archive-keyring`.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Whether they can be had here.
///
/// # Errors
/// They cannot.
pub fn can_be_had() -> Result<()> {
    let is_debian = Path::new("/usr/bin/apt-get").exists();
    ensure!(is_debian, "the kernels are Debian's, had by apt: run this on Debian");
    Ok(())
}

/// A kernel's files.
pub struct Files {
    /// What `uname -r` says there.
    pub release: String,
    /// What is booted.
    pub image: PathBuf,
    /// The folder that has `lib/modules`.
    base: PathBuf,
}

impl Kernel {
    /// Its files in the folder, downloaded if they are not there.
    pub fn files(&self, folder: &Path) -> Result<Files> {
        let root = folder.join("root");
        if !root.exists() {
            step("lab", &format!("downloading Linux {} of Debian {}", self.name, self.suite));
            let package = self.download(folder)?;
            let unpacking = folder.join("unpacking");
            remove(&unpacking)?;
            run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacking))?;
            fs::remove_file(&package)?;
            let files = Files::find(&unpacking)?;
            run(Command::new("depmod").arg("-b").arg(&files.base).arg(&files.release))?;
            fs::rename(&unpacking, &root)?;
        }
        Files::find(&root)
    }

    /// Downloads the package by apt, with sources and lists of its own.
    fn download(&self, folder: &Path) -> Result<PathBuf> {
        for part in ["sources", "lists/partial", "cache/archives/partial", "package"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let mirror = mirror()?;
        let source = format!(
            "Types: deb\nURIs: {mirror}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n",
            self.suite
        );
        fs::write(folder.join("sources/debian.sources"), source)?;
        let apt = |program: &str, words: &[&str]| {
            let mut command = Command::new(program);
            command.current_dir(folder.join("package"));
            for (option, value) in [
                ("Dir::Etc::SourceList", "/dev/null".into()),
                ("Dir::Etc::SourceParts", folder.join("sources")),
                ("Dir::State::Lists", folder.join("lists")),
                ("Dir::Cache", folder.join("cache")),
                ("Acquire::Languages", "none".into()),
                // The user that apt would become otherwise may not write here.
                ("APT::Sandbox::User", "root".into()),
            ] {
                command.arg("-o").arg(format!("{option}={}", value.display()));
            }
            command.args(words);
            command
        };
        let cannot = || format!("Linux {} cannot be had: is Debian's mirror reachable?", self.name);
        run(&mut apt("apt-get", &["update", "-qq"])).with_context(cannot)?;
        let depends = output(&mut apt("apt-cache", &["depends", PACKAGE])).with_context(cannot)?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .with_context(|| format!("Debian {} has no {PACKAGE}", self.suite))?;
        run(&mut apt("apt-get", &["download", "-qq", &format!("linux-image-{package}")]))?;
        only_entry(&folder.join("package"))
    }
}

impl Files {
    fn find(root: &Path) -> Result<Self> {
        let bases = [root.to_owned(), root.join("usr")];
        let base = bases.into_iter().find(|base| base.join("lib/modules").exists());
        let base = base.with_context(|| format!("no modules in {}", root.display()))?;
        let modules = only_entry(&base.join("lib/modules"))?;
        let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let image = root.join(format!("boot/vmlinuz-{release}"));
        ensure!(image.exists(), "no {}", image.display());
        Ok(Self { release, image, base })
    }

    /// Modules and what they depend on, in the order in which they are to be loaded.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for name in names {
            let mut command = Command::new("modprobe");
            command.arg("-d").arg(&self.base).args(["-S", &self.release, "--show-depends", name]);
            for line in output(&mut command)?.lines() {
                let path = line.strip_prefix("insmod ").map(|path| PathBuf::from(path.trim()));
                found.extend(path.filter(|path| !found.contains(path)));
            }
        }
        Ok(found)
    }
}

/// Where this machine gets its own Debian packages from.
fn mirror() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]);
    let targets = output(&mut command)?;
    for target in targets.lines() {
        let mut words = target.split(' ');
        // Not those of updates: they have a part of the packages.
        if let (Some(uri), Some(release), Some("main")) = (words.next(), words.next(), words.next())
            && !release.contains(['-', '/'])
        {
            return Ok(uri.to_owned());
        }
    }
    bail!("apt knows no mirror of Debian: add one to /etc/apt/sources.list.d")
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder)?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.path()),
        _ => bail!("{} does not hold one entry: remove it, and begin again", folder.display()),
    }
}

/// Removes a folder, if it is there.
pub fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}
