//! `cargo xtask demo --lab`: the demo in a machine of the lab, for who has no `/dev/kvm`.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::image;
use super::machine::{Event, Machine};
use crate::build::{results, target};
use crate::command::step;
use crate::kernels::{self, KERNELS};

/// The kernel: the demo's programs need tcx.
const KERNEL: &str = "6.12";

/// Warren's programs in it.
const OURS: [&str; 4] = ["warren-demo", "warrend", "warren-control", "warren"];

/// The tenants' servers.
const SERVERS: [&str; 3] = ["redis-server", "redis-cli", "nginx"];

/// As many microVMs as can be waited for.
const CLONES: u32 = 16;

/// How long it may take.
const PATIENCE: Duration = Duration::from_mins(15);

/// Runs the demo, and prints what it says.
///
/// # Errors
/// It fails, or the machine does.
pub fn run() -> Result<()> {
    kernels::can_be_had()?;
    let kernel = KERNELS.iter().find(|kernel| kernel.name == KERNEL).context("no such kernel")?;
    let folder = target().join("lab").join("demo");
    fs::create_dir_all(&folder)?;
    let servers = SERVERS.map(image::on_path).into_iter().collect::<Result<Vec<_>>>()?;
    let ours = OURS.map(|name| results().join(name));
    let demo = ours[0].display().to_string();
    let programs = image::of_programs(&folder, &[], ours.into_iter().chain(servers))?;
    let files = kernel.files(&target().join("lab").join(kernel.name))?;
    let seconds = PATIENCE.as_secs();
    let list = format!("demo {seconds} {demo} --clones {CLONES}\n");
    let initrd = image::of_kernel(&folder, &programs, &files, &list)?;
    step("demo", "in an emulated machine with ordinary KVM: its times mean nothing");
    let log: PathBuf = folder.join("console.log");
    let mut machine = Machine::boot(&files.image, &initrd, "demo", &log)?;
    let deadline = Instant::now() + PATIENCE;
    let mut ended = None;
    loop {
        match machine.next(deadline)? {
            Event::Up(release) => step("demo", &format!("Linux {release} is up")),
            Event::Begin(_) => {}
            Event::Line(line) => println!("{line}"),
            Event::End(_, status) => ended = Some(status),
            Event::Off => break,
        }
    }
    match ended {
        Some(0) => Ok(()),
        Some(status) => bail!("the demo failed in the lab ({status})"),
        None => bail!("the machine died or hung; all that it said is in {}", log.display()),
    }
}
