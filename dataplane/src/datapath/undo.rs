//! What an open changed so far, so that one that fails leaves the traffic as it was.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::SchedClassifierLink;
use aya::programs::{SchedClassifier, loaded_programs};

use super::Error;

/// Puts back, when it is dropped, what was changed; unless [`Undo::keep`] said that all went well.
#[derive(Default)]
pub(super) struct Undo {
    /// Pinned links whose program was replaced, and the number of the one that was there.
    hooks: Vec<(PathBuf, u32)>,
    /// Those programs: the kernel would otherwise forget one when its last hook gets another.
    former: HashMap<u32, SchedClassifier>,
    /// Pins that were made.
    pins: Vec<PathBuf>,
    /// All went well: what comes later is not put back.
    is_over: bool,
}

impl Undo {
    /// Remembers a pin that is about to be made.
    pub fn pin(&mut self, path: PathBuf) {
        if !self.is_over {
            self.pins.push(path);
        }
    }

    /// Remembers the program of a pinned link that is about to get another.
    pub fn hook(&mut self, path: &Path, link: &FdLink) -> Result<(), Error> {
        if self.is_over {
            return Ok(());
        }
        let error = |source| Error::program("look up the program of", path.display(), source);
        let info = link.info().map_err(|source| {
            Error::system("look up link", path.display(), io::Error::other(source))
        })?;
        let id = info.program_id();
        if let Entry::Vacant(entry) = self.former.entry(id) {
            let program = loaded_programs()
                .find(|program| program.as_ref().is_ok_and(|program| program.id() == id));
            // A program without an interface, since that is gone, has nothing to go back to.
            let Some(program) = program else { return Ok(()) };
            let program = program.map_err(error)?;
            let program =
                SchedClassifier::from_program_info(program, "former".into()).map_err(error)?;
            entry.insert(program);
        }
        self.hooks.push((path.to_owned(), id));
        Ok(())
    }

    /// All went well: nothing is put back, nor what is changed from now on.
    pub fn keep(&mut self) {
        self.is_over = true;
        self.hooks.clear();
        self.former.clear();
        self.pins.clear();
    }

    fn put_back(&mut self, path: &Path, id: u32) -> Result<(), Box<dyn std::error::Error>> {
        let Some(program) = self.former.get_mut(&id) else { return Ok(()) };
        let link = SchedClassifierLink::try_from(FdLink::from(PinnedLink::from_pin(path)?))?;
        let link = program.attach_to_link(link)?;
        program.take_link(link)?;
        Ok(())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for (path, id) in std::mem::take(&mut self.hooks).into_iter().rev() {
            if let Err(error) = self.put_back(&path, id) {
                tracing::error!("cannot put back the program of {}: {error}", path.display());
            }
        }
        for path in std::mem::take(&mut self.pins) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!("cannot unpin {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }
}
