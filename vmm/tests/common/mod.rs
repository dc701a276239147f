//! What the tests on real KVM share: templates, TAPs in namespaces of their own, microVMs.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod linux;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use warren_vmm::client::{MicroVm, TemplateMemory, Zygote, ZygoteConfig};
use warren_vmm::control::{PublicIdentity, ReleaseRequest, Tier, WATCHDOG};
use warren_vmm::jail::{self, JailConfig};
use warren_vmm::rates::Rates;
use warren_vmm::snapshot::Sources;

/// Whether this machine can run microVMs. If not it says so, loudly; under `WARREN_REQUIRE_KVM=1`
/// that is a failure.
pub fn kvm() -> bool {
    let missing = if let Err(error) = warren_vmm::template::open_kvm() {
        error.to_string()
    } else if let Err(error) = File::open("/dev/net/tun").and_then(|_| tap("probe")) {
        format!("no TAP can be made: {error}")
    } else {
        return true;
    };
    assert!(std::env::var("WARREN_REQUIRE_KVM").as_deref() != Ok("1"), "{missing}");
    // Not by eprintln!, which the test runner keeps to itself for a test that passes.
    let _ = writeln!(io::stderr(), "!!! SKIPPED, NOTHING WAS TESTED: {missing} !!!");
    false
}

/// The `warren-vmm` program of this build.
pub fn vmm() -> PathBuf {
    env!("CARGO_BIN_EXE_warren-vmm").into()
}

/// A guest program, where `cargo xtask build` puts it. `WARREN_GUEST` may name `warren-guest`
/// elsewhere; the others lie beside it.
pub fn guest(name: &str) -> PathBuf {
    let first = std::env::var_os("WARREN_GUEST").map_or_else(
        || {
            let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
            let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into());
            workspace.join(target).join("release/warren-guest.elf")
        },
        PathBuf::from,
    );
    let extension = first.extension().unwrap_or_default().to_owned();
    let path = first.with_file_name(name).with_extension(extension);
    assert!(path.exists(), "no {}: run `cargo xtask build`", path.display());
    path
}

/// A zygote with a directory of its own.
pub struct Host {
    pub zygote: Zygote,
    pub run_dir: TempDir,
    pub jail: JailConfig,
    pub config: ZygoteConfig,
    pids: Mutex<Vec<i32>>,
}

/// MicroVMs outlive their zygote; those of a failed test must not outlive it.
impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.pids.lock().unwrap().iter() {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        jail::remove_groups(&self.jail.cgroup);
    }
}

impl Host {
    pub async fn new(guest: &'static str) -> Self {
        Self::with_watchdog(guest, Duration::from_secs(5)).await
    }

    pub async fn with_watchdog(guest: &'static str, watchdog: Duration) -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let config = ZygoteConfig { watchdog, ..config(guest, run_dir.path()) };
        Self::start(config, run_dir).await
    }

    /// A zygote of what `choose` makes its sources.
    pub async fn with(choose: impl FnOnce(&mut ZygoteConfig)) -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let mut config = config_of(PathBuf::new().into(), run_dir.path());
        choose(&mut config);
        Self::start(config, run_dir).await
    }

    /// The same, with the memory of another zygote's template.
    pub async fn sharing(memory: &TemplateMemory, choose: impl FnOnce(&mut ZygoteConfig)) -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let mut config = config_of(PathBuf::new().into(), run_dir.path());
        choose(&mut config);
        let zygote = Zygote::spawn_sharing(&config, memory).await.unwrap();
        Self::of(zygote, config, run_dir)
    }

    async fn start(config: ZygoteConfig, run_dir: TempDir) -> Self {
        let zygote = Zygote::spawn(&config).await.unwrap();
        Self::of(zygote, config, run_dir)
    }

    fn of(zygote: Zygote, config: ZygoteConfig, run_dir: TempDir) -> Self {
        Self { zygote, run_dir, jail: config.jail.clone(), config, pids: Mutex::new(Vec::new()) }
    }

    /// Lets the zygote go and starts another one, as a restarted `warrend` does.
    pub async fn replace_zygote(&mut self, guest: &'static str) {
        self.zygote = Zygote::spawn(&config(guest, self.run_dir.path())).await.unwrap();
    }

    /// A parked microVM, on a TAP in a namespace of its own.
    pub async fn parked(&self, slot: u32) -> MicroVm {
        self.parked_on(slot, tap("w0").unwrap()).await
    }

    /// A microVM that goes up to this tier by itself.
    pub async fn forked(&self, slot: u32, tap: OwnedFd, tier: Tier) -> MicroVm {
        let microvm = self.zygote.fork(slot, tap, tier).await.unwrap();
        self.pids.lock().unwrap().push(microvm.pid());
        microvm
    }

    /// A parked microVM on this TAP.
    pub async fn parked_on(&self, slot: u32, tap: OwnedFd) -> MicroVm {
        let mut microvm = self.forked(slot, tap, Tier::Parked).await;
        microvm.advance(Tier::Parked).await.unwrap();
        microvm
    }

    /// The same, released.
    pub async fn running(&self, slot: u32) -> MicroVm {
        let mut microvm = self.parked(slot).await;
        microvm.release(&identity(slot)).await.unwrap();
        microvm
    }
}

/// What a zygote needs: a template of the guest program, in the directory of the sockets.
pub fn config(name: &'static str, run_dir: &Path) -> ZygoteConfig {
    let sources = Sources::from(run_dir.join(name));
    if !sources.template.exists() {
        make_template(name, &sources);
    }
    config_of(sources, run_dir)
}

fn config_of(sources: Sources, run_dir: &Path) -> ZygoteConfig {
    // No two directories have the same name.
    let name = run_dir.file_name().unwrap().to_str().unwrap();
    let jail = JailConfig::named(&format!("test{name}"));
    let (run_dir, rates) = (run_dir.to_owned(), Rates::default());
    ZygoteConfig { binary: vmm(), sources, run_dir, jail, rates, watchdog: WATCHDOG }
}

/// Makes a template of a guest program, encrypted if there is a key.
pub fn make_template(name: &str, sources: &Sources) {
    let mut command = Command::new(vmm());
    command.arg("template").arg("--guest").arg(guest(name));
    command.arg("--output").arg(&sources.template);
    if let Some(key) = &sources.key {
        command.arg("--key").arg(key);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Makes the image of a function in a template that is there; fails with what `warren-vmm` says.
pub fn make_image(sources: &Sources, function: &Path, image: &Path) -> Result<(), String> {
    make_image_with(sources, function, image, &["--memory", "4"])
}

/// The same, with more arguments.
pub fn make_image_with(
    sources: &Sources,
    function: &Path,
    image: &Path,
    arguments: &[&str],
) -> Result<(), String> {
    let mut command = Command::new(vmm());
    command.arg("image").arg("--template").arg(&sources.template);
    command.arg("--function").arg(function).arg("--output").arg(image).args(arguments);
    if let Some(key) = &sources.key {
        command.arg("--key").arg(key);
    }
    let output = command.output().unwrap();
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// An identity that differs from slot to slot.
pub fn identity(slot: u32) -> ReleaseRequest {
    let [_, _, high, low] = slot.to_be_bytes();
    ReleaseRequest {
        identity: PublicIdentity {
            instance_id: [low; 16],
            hostname: format!("instance-{slot}"),
            mac: [2, 0, 0, 0, high, low],
            ipv4: [169, 254, 8 + high, low],
            gateway: [169, 254, 1, 1],
            mtu: 1500,
        },
        tag: slot.to_be_bytes().to_vec(),
    }
}

/// A TAP in a new network namespace, in which `setup` runs as well. Both go away with the TAP.
pub fn tap_with(name: &str, setup: impl FnOnce() + Send + 'static) -> io::Result<OwnedFd> {
    let name = name.to_owned();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let tap = open_tap(&name)?;
        setup();
        Ok(tap)
    });
    thread.join().unwrap()
}

/// A TAP in a new network namespace.
pub fn tap(name: &str) -> io::Result<OwnedFd> {
    tap_with(name, || {})
}

#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: i16,
    padding: [u8; 22],
}

nix::ioctl_write_ptr_bad!(tun_set_iff, 0x4004_54ca, InterfaceRequest);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_size, 0x4004_54d8, i32);

fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16,
        padding: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let header = 12;
    // SAFETY: both structures are what the kernel reads for these requests, and live that long.
    unsafe {
        tun_set_iff(file.as_raw_fd(), &raw const request)?;
        tun_set_vnet_hdr_size(file.as_raw_fd(), &raw const header)?;
    }
    Ok(file.into())
}
