//! A zygote with TAPs of its own, for as many microVMs as a measurement needs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use warren_abi::wire::GATEWAY;
use warren_netns::fleet::{GUEST, built, template};
use warren_netns::netns::Namespace;
use warren_netns::rundir::RunDir;
use warren_vmm::client::{MicroVm, Zygote, ZygoteConfig};
use warren_vmm::control::{PublicIdentity, ReleaseRequest, Tier, WATCHDOG};
use warren_vmm::jail::JailConfig;
use warren_vmm::rates::Rates;

use crate::tap;

/// How long a call may take.
pub const CALL_LIMIT: Duration = Duration::from_secs(10);

/// A zygote, and a TAP for each slot.
pub struct Nursery {
    config: ZygoteConfig,
    zygote: Zygote,
    taps: Vec<File>,
    pids: Mutex<Vec<i32>>,
    _run: RunDir,
    _namespace: Namespace,
}

/// MicroVMs outlive their zygote: those of a measurement that failed must not.
impl Drop for Nursery {
    fn drop(&mut self) {
        for pid in self.pids.lock().iter().flat_map(|pids| pids.iter()) {
            kill(Pid::from_raw(*pid), Signal::SIGKILL).ok();
        }
    }
}

impl Nursery {
    /// Starts a zygote and makes the TAPs of so many slots.
    pub async fn new(slots: u32) -> Result<Self> {
        let run = RunDir::new()?;
        let namespace = Namespace::new("clone")?;
        let taps = (0..slots).map(|slot| tap::make(&namespace, &format!("vm{slot}")));
        let taps = taps.collect::<Result<_>>()?;
        let run_dir = run.path().join("vmm");
        std::fs::create_dir(&run_dir)?;
        let config = ZygoteConfig {
            binary: built("warren-vmm")?,
            sources: template(&run, GUEST)?.into(),
            run_dir,
            jail: JailConfig { cgroup: run.cgroup(), ..JailConfig::named("") },
            rates: Rates::default(),
            watchdog: WATCHDOG,
        };
        let zygote = Zygote::spawn(&config).await?;
        Ok(Self { config, zygote, taps, pids: Mutex::default(), _run: run, _namespace: namespace })
    }

    /// Forks a microVM into a slot and has it go on to a tier; returns at once.
    pub async fn fork(&self, slot: u32, tier: Tier) -> Result<MicroVm> {
        let tap = self.taps.get(slot as usize).context("no such slot")?.try_clone()?;
        let microvm = self.zygote.fork(slot, OwnedFd::from(tap), tier).await?;
        if let Ok(mut pids) = self.pids.lock() {
            pids.push(microvm.pid());
        }
        Ok(microvm)
    }

    /// Lets the zygote go, and starts another one.
    pub async fn restart(&mut self) -> Result<()> {
        self.zygote = Zygote::spawn(&self.config).await?;
        Ok(())
    }

    /// A microVM that is forked and released at once, without having been prepared.
    pub async fn started(&self, slot: u32) -> Result<MicroVm> {
        let mut microvm = self.fork(slot, Tier::Shell).await?;
        microvm.release(&identity(slot)).await?;
        Ok(microvm)
    }

    /// A microVM that is prepared up to a tier.
    pub async fn prepared(&self, slot: u32, tier: Tier) -> Result<MicroVm> {
        let mut microvm = self.fork(slot, tier).await?;
        microvm.advance(tier).await?;
        Ok(microvm)
    }

    /// Ends a microVM.
    pub async fn stop(&self, mut microvm: MicroVm) -> Result<()> {
        microvm.stop().await?;
        if let Ok(mut pids) = self.pids.lock() {
            pids.retain(|pid| *pid != microvm.pid());
        }
        Ok(())
    }
}

/// Who the microVM in a slot is to be.
pub fn identity(slot: u32) -> ReleaseRequest {
    let [_, _, high, low] = slot.to_be_bytes();
    let identity = PublicIdentity {
        instance_id: u128::from(slot).to_be_bytes(),
        hostname: format!("vm-{slot}"),
        mac: [2, 0, 0, 0, high, low],
        ipv4: [169, 254, 16 + high, low],
        gateway: GATEWAY.octets(),
        mtu: 1450,
    };
    ReleaseRequest { identity, tag: Vec::new() }
}
