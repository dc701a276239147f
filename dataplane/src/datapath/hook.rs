//! Programs at their hooks, where they stay when this process ends: by a pinned link of tcx, or,
//! before Linux 6.6, by a filter that a pin names ([`super::filter`]).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;

use super::Error;
use super::filter::Filter;
use super::netlink::Netlink;

/// A link whose pin was removed is detached by the kernel some time later; until then its program
/// cannot be attached to the same interface again.
const DETACH_PATIENCE: Duration = Duration::from_secs(1);

/// What a pin stands for: a program at a hook.
pub(super) enum Hook {
    Link(FdLink),
    Filter(Filter),
}

impl Hook {
    /// What is pinned there, if anything is.
    pub fn open(pin: &Path) -> Result<Option<Self>, Error> {
        if let Some(filter) = Filter::read(pin)? {
            return Ok(Some(Self::Filter(filter)));
        }
        match PinnedLink::from_pin(pin) {
            Ok(pinned) => Ok(Some(Self::Link(FdLink::from(pinned)))),
            Err(LinkError::SyscallError(missing))
                if missing.io_error.kind() == ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(source) => Err(Error::system("open pin", pin.display(), io::Error::other(source))),
        }
    }

    /// The number of the program that is there, if one is: an interface may be gone.
    pub fn program_id(&self) -> Result<Option<u32>, Error> {
        match self {
            Self::Link(link) => match link.info() {
                Ok(info) => Ok(Some(info.program_id())),
                Err(source) => {
                    let source = io::Error::other(source);
                    Err(Error::system("look up", "the program of a link", source))
                }
            },
            Self::Filter(filter) => Netlink::open()?.filter_program(*filter),
        }
    }

    /// Puts a program in the place of the one that is there: false if its interface is gone.
    pub fn replace(self, program: &mut SchedClassifier, pin: &Path) -> Result<bool, Error> {
        let error = |source| Error::program("replace the program of", pin.display(), source);
        let link = match self {
            Self::Filter(filter) => return filter.replace(program).map_err(error),
            Self::Link(link) => SchedClassifierLink::try_from(link).map_err(|source| {
                Error::system("open pin", pin.display(), io::Error::other(source))
            })?,
        };
        match program.attach_to_link(link).and_then(|id| program.take_link(id)) {
            // The link's descriptor is closed here; the pin holds the link.
            Ok(_) => Ok(true),
            Err(ProgramError::SyscallError(dead))
                if dead.io_error.raw_os_error() == Some(libc::ENOLINK) =>
            {
                Ok(false)
            }
            Err(source) => Err(error(source)),
        }
    }
}

/// Puts a program at a hook of an interface, behind all others or `in_front`, and pins it.
pub(super) fn attach(
    program: &mut SchedClassifier,
    pin: &Path,
    interface: &str,
    hook: TcAttachType,
    in_front: bool,
) -> Result<(), Error> {
    let error = |source| Error::program("attach a program to", interface, source);
    let pinning = |source| Error::system("pin", pin.display(), source);
    if !has_tcx() {
        let filter = Filter::attach(program, pin, interface, hook, in_front)?;
        return filter.pin(pin).map_err(pinning);
    }
    let deadline = Instant::now() + DETACH_PATIENCE;
    let attached = loop {
        let order = if in_front { LinkOrder::first() } else { LinkOrder::default() };
        let options = TcAttachOptions::TcxOrder(order);
        match program.attach_with_options(interface, hook, options) {
            Err(ProgramError::SyscallError(exists))
                if exists.io_error.kind() == ErrorKind::AlreadyExists
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            attached => break attached,
        }
    };
    let attached = attached.and_then(|id| program.take_link(id)).map_err(error)?;
    let attached =
        FdLink::try_from(attached).map_err(|source| pinning(io::Error::other(source)))?;
    attached.pin(pin).map(drop).map_err(|source| pinning(io::Error::other(source)))
}

/// Takes the program of a pin from its hook, and the pin away; no error if there is none.
pub(super) fn remove(pin: &Path) -> Result<(), Error> {
    if let Some(filter) = Filter::read(pin)? {
        filter.detach()?;
    }
    match fs::remove_file(pin) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| Error::system("unpin", pin.display(), source)),
    }
}

/// Gives a pin another's name, if there is one of this name; the other's program goes.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    if from.symlink_metadata().is_ok()
        && let Some(filter) = Filter::read(to)?
    {
        filter.detach()?;
    }
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| Error::system("rename pin", from.display(), source)),
    }
}

/// Whether programs are attached by tcx.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}
