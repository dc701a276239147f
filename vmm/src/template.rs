//! Makes a template: boots a guest up to its release barrier and saves it.

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_API_VERSION};
use kvm_ioctls::Kvm;
use warren_abi::microvm::{ABI_VERSION, FUNCTION_ABI};

use crate::boot::{self, BootError};
use crate::control::{EndReason, GuestKind, PublicIdentity};
use crate::cpu;
use crate::function::{Function, FunctionError};
use crate::linux;
use crate::linux::boot::{LinuxBootError, Program};
use crate::machine::{Exit, Machine, MachineError, Shell};
use crate::memory::{GuestRam, Pages, Part};
use crate::snapshot::diff::{self, Base, Snapshot};
use crate::snapshot::{self, Given, Header, Key, SnapshotError, Sources, Template};

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
    /// The kernel cannot be loaded.
    #[error("{}: {source}", path.display())]
    LinuxBoot {
        /// The kernel.
        path: PathBuf,
        /// Why.
        source: LinuxBootError,
    },
    /// The function cannot be used.
    #[error("{}: {source}", path.display())]
    Function {
        /// The file.
        path: PathBuf,
        /// Why.
        source: FunctionError,
    },
    /// A function of its own is for guests without an operating system.
    #[error("{}: a Linux guest's template: its function is its disk", .0.display())]
    LinuxFunction(PathBuf),
    /// Its guest knows nothing of functions.
    #[error("{}: its guest takes no function: make it anew with `warren-vmm template`", .0.display())]
    OldTemplate(PathBuf),
    /// This host cannot run it.
    #[error(
        "this host's KVM has no hardware virtualisation behind it (neither kvm_intel nor kvm_amd) and \
         cannot run Linux guests: use a host with VMX or SVM, or a no-OS guest"
    )]
    NoLinux,
    /// The disk is not what the template was made with.
    #[error("{}: {what}", template.display())]
    Disk {
        /// The template.
        template: PathBuf,
        /// What is wrong, and what to do.
        what: String,
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
    let memory = Part::new("warren-memory", memory_bytes).map_err(TemplateError::Memory)?.memfd;
    let map = |shared| GuestRam::map(&memory, memory_bytes, shared).map_err(TemplateError::Memory);
    let ram = map(true)?;
    let entry = boot::load(&ram, &elf)
        .map_err(|source| TemplateError::Boot { path: program.to_owned(), source })?;
    let mut booted = Shell::new(&kvm, &cpuid, GuestKind::NoOs)?.boot(ram, entry)?;
    booted.run_until(Exit::Barrier).map_err(TemplateError::Guest)?;
    save(booted, &kvm, &cpuid, &memory, None, output, key.as_ref())
}

/// Puts a function into a clone of a template and saves that, at its barrier, as a diff: the
/// function's image. Nothing of the function has run, unless its package asks for that. `data_bytes` is
/// for its data and heap; `None`: as much as it needs.
pub fn make_image(
    sources: &Sources,
    function: &Path,
    output: &Path,
    data_bytes: Option<u64>,
) -> Result<Summary, TemplateError> {
    let elf = std::fs::read(function)
        .map_err(|source| TemplateError::Program { path: function.to_owned(), source })?;
    let refuse = |source| TemplateError::Function { path: function.to_owned(), source };
    let function = Function::parse(&elf, data_bytes).map_err(refuse)?;
    let (kvm, cpuid) = open_kvm()?;
    let Template { header, mut memory, mut base, .. } = load(sources, None)?;
    if header.machine.kind() != GuestKind::NoOs {
        return Err(TemplateError::LinuxFunction(sources.template.clone()));
    }
    if header.abi_version < FUNCTION_ABI {
        return Err(TemplateError::OldTemplate(sources.template.clone()));
    }
    let data_bytes = function.data_bytes();
    memory.data = Some(Part::new("warren-data", data_bytes).map_err(TemplateError::Memory)?);
    memory.code = Some(function.code().map_err(TemplateError::Memory)?);
    let ram = GuestRam::clone_of(&memory).map_err(TemplateError::Memory)?;
    let shell = Shell::new(&kvm, &cpuid, GuestKind::NoOs)?;
    let mut machine = shell.load(ram, &header.machine, None, None)?;
    machine.take_function(&function).map_err(TemplateError::Guest)?;
    base.pages = function.code_pages().collect();
    let write = |machine: &mut Machine, base: &Base| {
        let snapshot = Snapshot::take(machine, base).map_err(TemplateError::Guest)?;
        let mut bytes = Vec::with_capacity(snapshot.bytes() as usize);
        snapshot.write(&mut bytes).map_err(TemplateError::Memory)?;
        Ok::<_, TemplateError>(diff::keep(output, bytes, sources.key.as_deref())?)
    };
    // What its clones will use shows in one of them.
    write(&mut machine, &base)?;
    let image = load(&Sources { diff: Some(output.to_owned()), ..sources.clone() }, None)?;
    let ram = GuestRam::clone_of(&image.memory).map_err(TemplateError::Memory)?;
    let clone =
        Shell::new(&kvm, &cpuid, GuestKind::NoOs)?.load(ram, &image.header.machine, None, None)?;
    (base.working_set, base.in_place) = try_out(clone)?;
    let file_bytes = write(&mut machine, &base)?;
    Ok(Summary { memory_bytes: image.memory.bytes(), file_bytes })
}

/// What a Linux guest is made of.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// `vmlinuz` or `vmlinux`.
    pub kernel: PathBuf,
    /// Initial file system, with Warren's agent as `/init`.
    pub initrd: PathBuf,
    /// The function's image, which clones read.
    pub disk: Option<PathBuf>,
    /// More of the kernel's command line.
    pub arguments: String,
    /// How long it may take to its barrier.
    pub patience: Duration,
}

/// Boots Linux and saves it at its agent's barrier.
pub fn make_linux(
    guest: &LinuxGuest,
    output: &Path,
    memory_bytes: u64,
    key: Option<&Path>,
) -> Result<Summary, TemplateError> {
    if !linux::is_possible() {
        return Err(TemplateError::NoLinux);
    }
    let key = Key::read_optional(key)?;
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| TemplateError::Program { path: path.clone(), source })
    };
    let (kernel, initrd) = (read(&guest.kernel)?, read(&guest.initrd)?);
    let program = Program { kernel, initrd, arguments: guest.arguments.clone() };
    let disk = guest.disk.as_deref().map(open).transpose()?;
    let (kvm, cpuid) = open_kvm()?;
    let memory = Part::new("warren-memory", memory_bytes).map_err(TemplateError::Memory)?.memfd;
    let ram = GuestRam::map(&memory, memory_bytes, true).map_err(TemplateError::Memory)?;
    let entry = linux::boot::load(&ram, &program)
        .map_err(|source| TemplateError::LinuxBoot { path: guest.kernel.clone(), source })?;
    let shell = Shell::new(&kvm, &cpuid, GuestKind::Linux)?;
    let disk_of_template = disk.as_ref().map(File::try_clone).transpose();
    let disk_of_template = disk_of_template.map_err(TemplateError::Memory)?;
    let mut booted = shell.boot_linux(&kvm, ram, entry, disk_of_template)?;
    run_to_barrier(&mut booted, guest.patience).map_err(TemplateError::Guest)?;
    save(booted, &kvm, &cpuid, &memory, disk, output, key.as_ref())
}

fn run_to_barrier(machine: &mut Machine, patience: Duration) -> Result<(), EndReason> {
    let deadline = Instant::now() + patience;
    loop {
        match machine.run()? {
            Exit::Barrier => return Ok(()),
            Exit::Kicked if Instant::now() < deadline => {
                machine.exchange()?;
            }
            Exit::Kicked => {
                let budget_ms = patience.as_millis() as u64;
                return Err(EndReason::Watchdog { rip: machine.rip(), budget_ms });
            }
            exit => {
                return Err(EndReason::Protocol { error: format!("{exit:?} before the barrier") });
            }
        }
    }
}

/// Saves a machine that stands at its barrier, after a clone of it was tried out.
fn save(
    mut booted: Machine,
    kvm: &Kvm,
    cpuid: &CpuId,
    memory: &File,
    disk: Option<File>,
    output: &Path,
    key: Option<&Key>,
) -> Result<Summary, TemplateError> {
    let machine = booted.save()?;
    let memory_bytes = booted.ram.bytes();
    drop(booted);
    let digest = disk.as_ref().map(digest).transpose().map_err(TemplateError::Memory)?;
    let map = |shared| GuestRam::map(memory, memory_bytes, shared).map_err(TemplateError::Memory);
    let shell = Shell::new(kvm, cpuid, machine.kind())?;
    let clone = shell.load(map(false)?, &machine, None, disk)?;
    let (working_set, in_place) = try_out(clone)?;
    let (abi_version, cpu_features) = (ABI_VERSION, cpu::required_features());
    let header = Header { abi_version, cpu_features, machine, disk: digest, working_set, in_place };
    snapshot::write(output, &header, &map(true)?, key)?;
    let file_bytes = std::fs::metadata(output).map_or(0, |metadata| metadata.len());
    Ok(Summary { memory_bytes, file_bytes })
}

fn open(path: &Path) -> Result<File, TemplateError> {
    File::open(path).map_err(|source| TemplateError::Program { path: path.to_owned(), source })
}

fn digest(mut file: &File) -> io::Result<[u8; 32]> {
    // Whoever asked for its size has left it at its end.
    file.rewind()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(*hasher.finalize().as_bytes())
}

/// Opens the disk that a template's clones are to have, if it is the one that it was made with.
pub fn open_disk(sources: &Sources, header: &Header) -> Result<Option<File>, TemplateError> {
    let refuse = |what: String| TemplateError::Disk { template: sources.template.clone(), what };
    match (header.disk, &sources.disk) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(refuse("made without a disk: give none".to_owned())),
        (Some(_), None) => Err(refuse("made with a disk: give the same one".to_owned())),
        (Some(expected), Some(path)) => {
            let file = open(path)?;
            let found = digest(&file)
                .map_err(|source| TemplateError::Program { path: path.clone(), source })?;
            if found != expected {
                let path = path.display();
                return Err(refuse(format!("made with another disk than {path}: make it anew")));
            }
            Ok(Some(file))
        }
    }
}

/// Parks a clone and runs it until it has nothing to do, or, as Linux never says so, until it has
/// acknowledged its identity; returns the pages that it wrote to, and all that it used.
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
        while !clone.has_interrupts() && !matches!(clone.run()?, Exit::Wait(_)) {}
        Ok(())
    })();
    ended.map_err(TemplateError::Guest)?;
    clone.ram.pages_in_place().map_err(TemplateError::Memory)
}

/// Loads a template for this host, with the memory that was given if it is of that.
pub fn load(sources: &Sources, given: Option<Given>) -> Result<Template, TemplateError> {
    let template = snapshot::read(sources, given)?;
    let missing = cpu::missing_features(&template.header.cpu_features);
    if !missing.is_empty() {
        return Err(SnapshotError::Cpu { path: sources.template.clone(), missing }.into());
    }
    if template.header.machine.kind() == GuestKind::Linux && !linux::is_possible() {
        return Err(TemplateError::NoLinux);
    }
    Ok(template)
}
