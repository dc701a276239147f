//! What the programs log, passed on to this process's log: only if they were built to (feature
//! `log`, for debugging), since a message costs more than all the rest of a packet.

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;

use aya::Ebpf;
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Error;

/// How often the reader looks whether it is still wanted, in milliseconds.
const PATIENCE_MS: u16 = 200;

/// Programs log for as long as it lives.
pub(super) struct Reader {
    _alive: Arc<()>,
}

impl Reader {
    /// Reads what programs log, on a thread. None if they were built without.
    pub fn start(ebpf: &mut Ebpf) -> Result<Option<Self>, Error> {
        let mut logger = match EbpfLogger::init(ebpf) {
            Ok(logger) => logger,
            Err(aya_log::Error::MapNotFound) => return Ok(None),
            Err(error) => {
                let source = std::io::Error::other(error);
                return Err(Error::system("read the log of", "the programs", source));
            }
        };
        let alive = Arc::new(());
        let wanted: Weak<()> = Arc::downgrade(&alive);
        thread::Builder::new()
            .name("verdicts".to_owned())
            .spawn(move || {
                while wanted.strong_count() > 0 {
                    let mut fds = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
                    // Interrupted or timed out: there may be something all the same.
                    let _ = poll(&mut fds, PollTimeout::from(PATIENCE_MS));
                    logger.flush();
                }
            })
            .map_err(|source| Error::system("start", "thread for the programs' log", source))?;
        Ok(Some(Self { _alive: alive }))
    }
}
