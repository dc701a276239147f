//! Programs at the hooks of kernels without tcx: filters of an interface's clsact qdisc.
//!
//! A filter has no link that could be pinned; it stays until it, or its interface, is removed. So in
//! the place of a link's pin there is a symbolic link whose target tells where the filter is. It is
//! listed and renamed as a pin is, and goes with the file system when the machine does.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io::{self, ErrorKind};
use std::mem::forget;
use std::os::unix::fs::symlink;
use std::path::Path;

use aya::programs::links::Link;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use nix::net::if_::{if_indextoname, if_nametoindex};

use super::Error;

/// What the target of a pin begins with.
const KIND: &str = "clsact";

/// Priority of the first filter at a hook. Others' that were given none come in front of it, as what
/// is attached by tcx later would behind it: programs here have the last word about their packets.
const FIRST: u16 = 1 << 15;

/// The only filter of its priority.
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Where a filter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Index of the interface.
    pub interface: u32,
    pub is_egress: bool,
    pub priority: u16,
}

impl Display for Filter {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { interface, is_egress, priority } = self;
        let hook = if *is_egress { "egress" } else { "ingress" };
        write!(f, "{KIND} {interface} {hook} {priority}")
    }
}

impl Filter {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        words.next().filter(|kind| *kind == KIND)?;
        let interface = words.next()?.parse().ok()?;
        let is_egress = match words.next()? {
            "ingress" => false,
            "egress" => true,
            _ => return None,
        };
        let priority = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Self { interface, is_egress, priority })
    }

    /// The one that a pin names; none if there is no pin, or a link's.
    pub fn read(pin: &Path) -> Result<Option<Self>, Error> {
        let target = match fs::read_link(pin) {
            Ok(target) => target,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                return Ok(None);
            }
            Err(source) => return Err(Error::system("read pin", pin.display(), source)),
        };
        let filter = target.to_str().and_then(Self::parse).ok_or_else(|| {
            let remedy = "remove the pin: it names no filter of this program's";
            Error::invalid("target of a pin", target.display(), remedy)
        })?;
        Ok(Some(filter))
    }

    /// Names it by a pin.
    pub fn pin(self, pin: &Path) -> io::Result<()> {
        symlink(self.to_string(), pin)
    }

    /// Adds one with this program, to be named by `pin`: behind all that the pins beside that name at
    /// this hook, or in front of them.
    pub fn attach(
        program: &mut SchedClassifier,
        pin: &Path,
        interface: &str,
        hook: TcAttachType,
        in_front: bool,
    ) -> Result<Self, Error> {
        let error = |source| Error::program("attach a program to", interface, source);
        let index = if_nametoindex(interface)
            .map_err(|source| Error::system("look up", interface, source.into()))?;
        match qdisc_add_clsact(interface) {
            Err(exists) if errno(&exists) == Some(libc::EEXIST) => {}
            added => added.map_err(|source| error(source.into()))?,
        }
        let is_egress = hook == TcAttachType::Egress;
        let mut taken = Vec::new();
        for entry in fs::read_dir(pin.parent().unwrap_or(pin)).into_iter().flatten().flatten() {
            let filter = Self::read(&entry.path())?;
            let here = filter.filter(|it| it.interface == index && it.is_egress == is_egress);
            taken.extend(here.map(|filter| filter.priority));
        }
        let priority = match (in_front, taken.iter().min(), taken.iter().max()) {
            (true, Some(first), _) => first - 1,
            (false, _, Some(last)) => last + 1,
            _ => FIRST,
        };
        let filter = Self { interface: index, is_egress, priority };
        // One that no pin names was left by a process that was killed before it could pin it.
        filter.detach()?;
        let options = NlOptions { priority, handle: HANDLE, classid: None };
        let attached = program
            .attach_with_options(interface, hook, TcAttachOptions::Netlink(options))
            .and_then(|id| program.take_link(id))
            .map_err(error)?;
        // It holds nothing; dropped, it would remove the filter.
        forget(attached);
        Ok(filter)
    }

    /// Puts a program in the place of its own, without a packet between that sees neither. False if it
    /// is gone.
    pub fn replace(self, program: &mut SchedClassifier) -> Result<bool, ProgramError> {
        let Some(link) = self.link() else { return Ok(false) };
        match program.attach_to_link(link).and_then(|id| program.take_link(id)) {
            Ok(attached) => {
                // As above.
                forget(attached);
                Ok(true)
            }
            Err(ProgramError::TcError(gone)) if is_gone(errno(&gone)) => Ok(false),
            Err(source) => Err(source),
        }
    }

    /// Removes it; no error if it is gone.
    pub fn detach(self) -> Result<(), Error> {
        let Some(link) = self.link() else { return Ok(()) };
        match link.detach() {
            Err(ProgramError::NetlinkError(gone)) if is_gone(gone.raw_os_error()) => Ok(()),
            result => result.map_err(|source| Error::program("remove filter", self, source)),
        }
    }

    /// It, as `aya` knows it, unless its interface is gone.
    fn link(self) -> Option<SchedClassifierLink> {
        let name = if_indextoname(self.interface).ok()?;
        let hook = if self.is_egress { TcAttachType::Egress } else { TcAttachType::Ingress };
        SchedClassifierLink::attached(name.to_str().ok()?, hook, self.priority, HANDLE, None).ok()
    }
}

/// Whether there is no such filter, or none at all: EINVAL stands for a missing qdisc.
fn is_gone(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENOENT | libc::ENODEV | libc::EINVAL))
}

fn errno(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::Filter;

    #[test]
    fn what_a_pin_says_is_understood_and_nothing_else() {
        for (is_egress, priority) in [(false, 32768), (true, 32767)] {
            let filter = Filter { interface: 7, is_egress, priority };
            assert_eq!(Filter::parse(&filter.to_string()), Some(filter));
        }
        for text in ["", "clsact", "clsact 7 ingress", "clsact 7 in 1", "tcx 7 ingress 1"] {
            assert_eq!(Filter::parse(text), None, "{text}");
        }
        assert_eq!(Filter::parse("clsact 7 ingress 1 more"), None);
        assert_eq!(Filter::parse("clsact 7 ingress 65536"), None);
    }
}
