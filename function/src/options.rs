//! What the tenant wants of a function, which with its code makes the package.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::compiled::Compiled;
use crate::package::{self, Manifest, PackageError};

/// What a function is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Its environment, in order.
    pub environment: Vec<(String, String)>,
    /// The most that its linear memories may have together, in bytes.
    pub memory_bytes: u64,
    /// The longest that a call may take, in milliseconds.
    pub timeout_ms: u32,
    /// Files that it sees, read-only: path below the root, and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// Its instantiation, start functions included, is to be part of the image.
    pub initialise: bool,
    /// It answers any number of calls, one after the other.
    pub reuse: bool,
}

/// Why code and options make no package.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A name of the environment cannot be one.
    #[error("{0:?} cannot be a variable's name: it has one character at least, no = and no NUL")]
    Variable(String),
    /// A variable is given twice.
    #[error("the variable {0} is given twice: give it once")]
    VariableTwice(String),
    /// A path cannot be a file's.
    #[error(
        "{0:?} cannot be a file's path: it has names with / between them, and no `.`, `..` or NUL"
    )]
    Path(String),
    /// A path is given twice, or is also that of a directory.
    #[error("the file {0} is given twice, or is a directory of another one: give it one name")]
    PathTwice(String),
    /// Its memory is too small to begin.
    #[error(
        "the function's memories begin with {needed} bytes, and it may have {allowed}: allow it more memory"
    )]
    Memory {
        /// What it needs, in bytes.
        needed: u64,
        /// What it may have, in bytes.
        allowed: u64,
    },
    /// Calls have no time.
    #[error("the function's calls have no time: give them 1 ms at least")]
    Timeout,
    /// They cannot be written.
    #[error(transparent)]
    Package(#[from] PackageError),
}

impl Options {
    /// The package of this code with these options: with the same of both, the same bytes.
    ///
    /// # Errors
    /// [`OptionsError`].
    pub fn package(self, compiled: &Compiled) -> Result<Vec<u8>, OptionsError> {
        self.check(compiled)?;
        let manifest = Manifest {
            environment: self.environment,
            memory_bytes: self.memory_bytes,
            timeout_ms: self.timeout_ms,
            starts_nothing: compiled.checked.starts_nothing,
            initialise: self.initialise,
            reuse: self.reuse,
            ..Manifest::default()
        };
        Ok(package::write(manifest, &compiled.code, self.files)?)
    }

    fn check(&self, compiled: &Compiled) -> Result<(), OptionsError> {
        let mut names = BTreeSet::new();
        for (name, value) in &self.environment {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(OptionsError::Variable(name.clone()));
            }
            if !names.insert(name) {
                return Err(OptionsError::VariableTwice(name.clone()));
            }
        }
        let mut paths = BTreeSet::new();
        for (path, _) in &self.files {
            let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
            if !path.split('/').all(is_name) {
                return Err(OptionsError::Path(path.clone()));
            }
            if !paths.insert(path.as_str()) {
                return Err(OptionsError::PathTwice(path.clone()));
            }
        }
        let is_directory = |path: &&str| {
            let mut parents = path.match_indices('/').map(|(end, _)| &path[..end]);
            parents.any(|parent| paths.contains(parent))
        };
        if let Some(path) = paths.iter().find(|path| is_directory(path)) {
            return Err(OptionsError::PathTwice((*path).to_owned()));
        }
        let (needed, allowed) = (compiled.checked.memory_bytes, self.memory_bytes);
        if needed > allowed {
            return Err(OptionsError::Memory { needed, allowed });
        }
        if self.timeout_ms == 0 {
            return Err(OptionsError::Timeout);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Checked;
    use crate::digest::Digest;
    use crate::package::Package;

    fn compiled() -> Compiled {
        let checked = Checked { starts_nothing: true, memory_bytes: 1 << 20 };
        Compiled { code: b"code".to_vec(), checked }
    }

    fn options() -> Options {
        let text = str::to_owned;
        Options {
            environment: vec![(text("A"), text("b")), (text("B"), text(""))],
            memory_bytes: 1 << 20,
            timeout_ms: 1000,
            files: vec![(text("etc/a"), b"a".to_vec()), (text("etc/b"), vec![])],
            initialise: false,
            reuse: false,
        }
    }

    #[test]
    fn a_package_has_what_was_asked_for() {
        let options = Options { initialise: true, ..options() };
        let bytes = options.clone().package(&compiled()).unwrap();
        let manifest = Package::parse(&bytes).unwrap().manifest;
        assert_eq!(manifest.environment, options.environment);
        assert_eq!((manifest.memory_bytes, manifest.timeout_ms), (1 << 20, 1000));
        assert!(manifest.starts_nothing && manifest.initialise);
        assert_eq!(manifest.files[0].path, "etc/a");
    }

    #[test]
    fn the_digest_is_that_of_code_and_options() {
        let digest =
            |options: Options, compiled: &Compiled| Digest::of(&options.package(compiled).unwrap());
        let one = digest(options(), &compiled());
        let mut reordered = options();
        reordered.files.reverse();
        assert_eq!(one, digest(reordered, &compiled()));
        let mut others = vec![
            Options { memory_bytes: 2 << 20, ..options() },
            Options { timeout_ms: 1001, ..options() },
            Options { initialise: true, ..options() },
            Options { reuse: true, ..options() },
            Options { files: vec![], ..options() },
            Options { environment: vec![], ..options() },
        ];
        for other in others.drain(..) {
            assert_ne!(one, digest(other.clone(), &compiled()), "{other:?}");
        }
        let code = Compiled { code: b"other".to_vec(), ..compiled() };
        assert_ne!(one, digest(options(), &code));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |change: &dyn Fn(&mut Options)| {
            let mut options = options();
            change(&mut options);
            options.package(&compiled()).unwrap_err()
        };
        let text = str::to_owned;
        for name in ["", "A=B", "A\0"] {
            let error = refused(&|options| options.environment[0].0 = text(name));
            assert_eq!(error, OptionsError::Variable(text(name)));
        }
        let twice = refused(&|options| options.environment[0].0 = text("B"));
        assert_eq!(twice, OptionsError::VariableTwice(text("B")));
        for path in ["", "/etc", "a/../b", "a//b", "a/", "./a", "a\0"] {
            let error = refused(&|options| options.files[0].0 = text(path));
            assert_eq!(error, OptionsError::Path(text(path)));
        }
        for (path, of) in [("etc/b", "etc/b"), ("etc", "etc/b"), ("etc/b/c", "etc/b/c")] {
            let error = refused(&|options| options.files[0].0 = text(path));
            assert_eq!(error, OptionsError::PathTwice(text(of)));
        }
        let memory = OptionsError::Memory { needed: 1 << 20, allowed: 4096 };
        assert_eq!(refused(&|options| options.memory_bytes = 4096), memory);
        assert_eq!(refused(&|options| options.timeout_ms = 0), OptionsError::Timeout);
    }
}
