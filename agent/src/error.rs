//! Why a guest cannot go on.

use std::io;

/// Why a guest cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM is of another release, or there is none.
    #[error(
        "the boot page is of ABI version {found}, not {expected}: make the template anew, with the \
         VMM and the agent of one release"
    )]
    Abi {
        /// What the page says.
        found: u32,
        /// What this agent is built for.
        expected: u32,
    },
    /// The VMM's network device did not appear.
    #[error(
        "there is no {name}: the VMM must describe a virtio-net device in its ACPI tables, and \
         virtio_net and virtio_mmio must be among the initrd's modules"
    )]
    NoInterface {
        /// Its name.
        name: String,
    },
    /// An identity without the frequency of its clock.
    #[error("the identity's tsc_hz is 0: the VMM must write the guest's frequency there")]
    NoFrequency,
}

/// Names what was tried.
pub(crate) fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> AgentError {
    move |error| AgentError::System { what: what.into(), source: error.into() }
}
