//! What an open changed so far, so that one that fails leaves the traffic as it was.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, loaded_programs};

use super::Error;
use super::hook::{self, Hook};

/// Puts back, when it is dropped, what was changed; unless [`Undo::keep`] said that all went well.
#[derive(Default)]
pub(super) struct Undo {
    /// Pinned hooks whose program was replaced, and the number of the one that was there.
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

    /// Remembers the program of a pinned hook that is about to get another.
    pub fn hook(&mut self, path: &Path, hook: &Hook) -> Result<(), Error> {
        if self.is_over {
            return Ok(());
        }
        let error = |source| Error::program("look up the program of", path.display(), source);
        let Some(id) = hook.program_id()? else { return Ok(()) };
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
        if let Some(hook) = Hook::open(path)? {
            hook.replace(program, path)?;
        }
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
            if let Err(error) = hook::remove(&path) {
                tracing::error!("{error}");
            }
        }
    }
}
