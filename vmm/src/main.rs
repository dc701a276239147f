//! The `warren-vmm` program: makes templates, and runs the zygote that `warrend` starts.
#![deny(missing_docs)]

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tracing_subscriber::EnvFilter;
use warren_vmm::control::WATCHDOG;
use warren_vmm::jail::{FIRST_UID, JailConfig};
use warren_vmm::rates::Rates;
use warren_vmm::snapshot::Sources;
use warren_vmm::template::{self, LinuxGuest, Summary};
use warren_vmm::zygote::{self, Options};

/// Snapshot-cloned microVMs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boots a guest up to its release barrier and saves it as a template: a no-OS guest's program,
    /// or Linux with Warren's agent.
    Template {
        /// A no-OS guest's program.
        #[arg(long, value_name = "ELF", required_unless_present = "kernel")]
        guest: Option<PathBuf>,
        /// A Linux guest's kernel: vmlinuz or vmlinux.
        #[arg(long, value_name = "FILE", conflicts_with = "guest", requires = "initrd")]
        kernel: Option<PathBuf>,
        /// Its initial file system, with Warren's agent as /init.
        #[arg(long, value_name = "FILE", requires = "kernel")]
        initrd: Option<PathBuf>,
        /// The function's image (ext4), which the Linux guest's clones read.
        #[arg(long, value_name = "FILE", requires = "kernel")]
        disk: Option<PathBuf>,
        /// More of the kernel's command line.
        #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "quiet")]
        append: String,
        /// How long Linux may take to its barrier, in seconds.
        #[arg(long, value_name = "SECONDS", requires = "kernel", default_value_t = 120)]
        boot_seconds: u64,
        /// Where to write the template.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Guest memory, in MiB: a multiple of 2, 4 to 512; for Linux 64 to 3072 [default: 16, for
        /// Linux 128]
        #[arg(long)]
        memory: Option<u64>,
        /// A key file of 32 bytes, to encrypt the template with.
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// How to print what was made.
        #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
        output_format: OutputFormat,
    },
    /// Puts a function into a no-OS guest's template and saves what that adds as the function's image:
    /// a diff, whose clones answer calls with the function.
    Image {
        /// The template.
        #[arg(long, value_name = "FILE")]
        template: PathBuf,
        /// The function: a package or a static executable (see `warren_vmm::function`).
        #[arg(long, value_name = "FILE")]
        function: PathBuf,
        /// Where to write the image.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Memory for the function's data, in MiB: a multiple of 2, 2 to 512 [default: what a package
        /// needs, and 16 for an executable]
        #[arg(long)]
        memory: Option<u64>,
        /// The template's key file, to encrypt the image with as well.
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// How to print what was made.
        #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
        output_format: OutputFormat,
    },
    /// Forks microVMs from a template for the client at the other end of a socket (see
    /// `warren_vmm::client`); not for people.
    Zygote {
        /// The template.
        #[arg(long, value_name = "FILE")]
        template: PathBuf,
        /// A diff against it: microVMs are clones of the one that it was taken of.
        #[arg(long, value_name = "FILE")]
        diff: Option<PathBuf>,
        /// The function's image that a Linux guest's template was made with.
        #[arg(long, value_name = "FILE")]
        disk: Option<PathBuf>,
        /// The key file of template and diff.
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// The template's memory comes over the control socket.
        #[arg(long)]
        takes_memory: bool,
        /// Directory of the microVMs' sockets.
        #[arg(long, value_name = "DIR")]
        run_dir: PathBuf,
        /// Descriptor of the control socket (`SOCK_SEQPACKET`).
        #[arg(long, value_name = "N")]
        control_fd: RawFd,
        /// How long a guest may run without an exit, in milliseconds of processor time.
        #[arg(long, value_name = "MS", default_value_t = WATCHDOG.as_millis() as u64)]
        watchdog_ms: u64,
        /// User and group of slot 0's microVM; slot N has the Nth after it.
        #[arg(long, value_name = "ID", default_value_t = FIRST_UID)]
        first_uid: u32,
        /// Control group of the microVMs, below the root of each hierarchy.
        #[arg(long, value_name = "NAME", default_value = "warren/vmm")]
        cgroup: PathBuf,
        /// Share of one processor that each microVM may use, in percent.
        #[arg(long, value_name = "PERCENT", default_value_t = 100)]
        cpu_percent: u32,
        #[command(flatten)]
        rates: Rates,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum OutputFormat {
    Text,
    Json,
}

fn main() -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match Arguments::parse().command {
        Command::Template {
            guest,
            kernel,
            initrd,
            disk,
            append: arguments,
            boot_seconds,
            output,
            memory,
            key,
            output_format,
        } => {
            let key = key.as_deref();
            let summary = match (guest, kernel, initrd) {
                (None, Some(kernel), Some(initrd)) => {
                    let patience = Duration::from_secs(boot_seconds);
                    let guest = LinuxGuest { kernel, initrd, disk, arguments, patience };
                    template::make_linux(&guest, &output, memory.unwrap_or(128) << 20, key)?
                }
                (Some(guest), ..) => {
                    template::make(&guest, &output, memory.unwrap_or(16) << 20, key)?
                }
                _ => bail!("give --guest, or --kernel and --initrd"),
            };
            report(&output, &summary, output_format)
        }
        Command::Image { template, function, output, memory, key, output_format } => {
            let sources = Sources { key, ..Sources::from(template) };
            let summary = template::make_image(
                &sources,
                &function,
                &output,
                memory.map(|memory| memory << 20),
            )?;
            report(&output, &summary, output_format)
        }
        Command::Zygote {
            template,
            diff,
            disk,
            key,
            takes_memory,
            run_dir,
            control_fd,
            watchdog_ms,
            first_uid,
            cgroup,
            cpu_percent,
            rates,
        } => {
            let control = take_control(control_fd).context("--control-fd")?;
            let watchdog = Duration::from_millis(watchdog_ms);
            let jail = JailConfig { first_uid, cgroup, cpu_percent };
            let sources = Sources { template, diff, disk, key };
            let options = Options { sources, takes_memory, run_dir, jail, rates, watchdog };
            match zygote::run(&options, control)? {
                zygote::Ended::Zygote => Ok(ExitCode::SUCCESS),
                zygote::Ended::MicroVm(reason) => Ok(ExitCode::from(reason.exit_code() as u8)),
            }
        }
    }
}

/// Prints what was made.
fn report(output: &Path, summary: &Summary, format: OutputFormat) -> anyhow::Result<ExitCode> {
    match format {
        OutputFormat::Json => println!("{}", serde_json::to_string(summary)?),
        OutputFormat::Text => println!(
            "{}: {} MiB of memory in {} KiB",
            output.display(),
            summary.memory_bytes >> 20,
            summary.file_bytes >> 10
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes the control socket to a descriptor that is not a standard one, and closes whatever else
/// was inherited: a microVM keeps what its zygote has.
fn take_control(fd: RawFd) -> anyhow::Result<OwnedFd> {
    // SAFETY: only this function uses the descriptor, which stays open meanwhile.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    let control = fcntl(inherited, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: just made by fcntl, owned by nobody else.
    let control = unsafe { OwnedFd::from_raw_fd(control) };
    let own = control.as_raw_fd() as u32;
    for (first, last) in [(3, own - 1), (own + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: this process has opened no descriptor but its own so far.
            Errno::result(unsafe { libc::close_range(first, last, 0) })?;
        }
    }
    if fd == 0 {
        // Standard input stays open, lest something else gets its number.
        nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    }
    Ok(control)
}
