//! Makes a template: boots a guest up to its release barrier and saves it.

use std::io;
use std::path::{Path, PathBuf};

use kvm_bindings::{CpuId, KVM_API_VERSION};
use kvm_ioctls::Kvm;
use warren_abi::microvm::ABI_VERSION;

use crate::boot::{self, BootError};
use crate::control::{EndReason, PublicIdentity};
use crate::cpu;
use crate::machine::{Exit, Machine, MachineError, Shell};
use crate::memory::{GuestRam, Pages, create_memfd};
use crate::snapshot::{self, Header, Key, SnapshotError, Sources, Template};

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is no usable `/dev/kvm`.
    #[error("cannot open /dev/kvm: {0}; load the kvm module and give this user access to it")]
    NoKvm(kvm_ioctls::Error),
    /// `/dev/kvm` is something else.
    #[error("/dev/kvm does not speak KVM's API: is it the kernel's device?")]
    NotKvm,
    /// KVM does not say what processors it offers.
    #[error("KVM: {0}")]
    Kvm(kvm_ioctls::Error),
    /// The program cannot be read.
    #[error("{}: {source}", path.display())]
    Program {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program cannot be loaded.
    #[error("{}: {source}", path.display())]
    Boot {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BootError,
    },
    /// No memory for it.
    #[error("guest memory: {0}")]
    Memory(io::Error),
    /// The machine cannot be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest did not come to its barrier.
    #[error("the guest ended before its release barrier: {0}")]
    Guest(EndReason),
    /// The file cannot be written or read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// What was made.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// Size of guest memory.
    pub memory_bytes: u64,
    /// Size of the file.
    pub file_bytes: u64,
}

/// Opens KVM and asks what it offers to guests.
pub fn open_kvm() -> Result<(Kvm, CpuId), TemplateError> {
    let kvm = Kvm::new().map_err(TemplateError::NoKvm)?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(TemplateError::NotKvm);
    }
    let cpuid = cpu::supported_cpuid(&kvm).map_err(TemplateError::Kvm)?;
    Ok((kvm, cpuid))
}

/// Boots the program and saves it at its barrier, encrypted if a key file is named.
pub fn make(
    program: &Path,
    output: &Path,
    memory_bytes: u64,
    key: Option<&Path>,
) -> Result<Summary, TemplateError> {
    let key = Key::read_optional(key)?;
    let elf = std::fs::read(program)
        .map_err(|source| TemplateError::Program { path: program.to_owned(), source })?;
    let (kvm, cpuid) = open_kvm()?;
    let memory = create_memfd(memory_bytes).map_err(TemplateError::Memory)?;
    let map = |shared| GuestRam::map(&memory, memory_bytes, shared).map_err(TemplateError::Memory);
    let ram = map(true)?;
    let entry = boot::load(&ram, &elf)
        .map_err(|source| TemplateError::Boot { path: program.to_owned(), source })?;
    let mut booted = Shell::new(&kvm, &cpuid)?.boot(ram, entry)?;
    booted.run_until(Exit::Barrier).map_err(TemplateError::Guest)?;
    let machine = booted.save()?;
    drop(booted);
    let clone = Shell::new(&kvm, &cpuid)?.load(map(false)?, &machine, None)?;
    let (working_set, in_place) = try_out(clone)?;
    let (abi_version, cpu_features) = (ABI_VERSION, cpu::required_features());
    let header = Header { abi_version, cpu_features, machine, working_set, in_place };
    snapshot::write(output, &header, &map(true)?, key.as_ref())?;
    let file_bytes = std::fs::metadata(output).map_or(0, |metadata| metadata.len());
    Ok(Summary { memory_bytes, file_bytes })
}

/// Parks a clone and runs it until it has nothing to do; returns the pages that it wrote to, and all
/// that it used.
fn try_out(mut clone: Machine) -> Result<(Vec<Pages>, Vec<Pages>), TemplateError> {
    let nobody = PublicIdentity {
        hostname: "template".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        ipv4: [169, 254, 1, 2],
        gateway: [169, 254, 1, 1],
        mtu: 1500,
        ..PublicIdentity::default()
    };
    let ended = (|| {
        clone.park()?;
        clone.release(&nobody)?;
        clone.run_until(Exit::Ready)?;
        while !matches!(clone.run()?, Exit::Wait(_)) {}
        Ok(())
    })();
    ended.map_err(TemplateError::Guest)?;
    clone.ram.pages_in_place().map_err(TemplateError::Memory)
}

/// Loads a template for this host.
pub fn load(sources: &Sources) -> Result<Template, SnapshotError> {
    let template = snapshot::read(sources)?;
    let missing = cpu::missing_features(&template.header.cpu_features);
    if missing.is_empty() {
        Ok(template)
    } else {
        Err(SnapshotError::Cpu { path: sources.template.clone(), missing })
    }
}
