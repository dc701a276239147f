//! `warren function new`: the examples' files, which are part of this program.

use std::fs;
use std::io;
use std::path::Path;

use clap::ValueEnum;

use super::New;
use crate::args::Output;
use crate::commands::print;
use crate::error::Error;
use crate::render::{self, FileRow};

/// What a function is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// Built by cargo.
    Rust,
    /// Built by npm and componentize-js.
    Javascript,
    /// Built by componentize-py.
    Python,
    /// Built by clang and wit-bindgen.
    C,
}

/// A path, and what the file there contains.
type File = (&'static str, &'static str);

macro_rules! example {
    ($folder:literal: $($path:literal),*) => {
        &[$(($path, include_str!(concat!("../../../examples/", $folder, "/", $path)))),*]
    };
}

impl Language {
    fn files(self) -> &'static [File] {
        match self {
            Self::Rust => {
                example!("rust": "Cargo.toml", "Cargo.lock", "src/lib.rs", "src/redis.rs")
            }
            Self::Javascript => {
                example!("javascript": "app.js", "build.js", "package.json", "package-lock.json")
            }
            Self::Python => example!("python": "app.py", "requirements.txt"),
            Self::C => example!("c": "Makefile", "app.c"),
        }
    }

    /// How a component is made of them, in that folder. WIT is the folder of WASI's WIT files.
    fn build(self) -> &'static str {
        match self {
            Self::Rust => {
                "rustup target add wasm32-wasip2 && cargo build --release --target wasm32-wasip2"
            }
            Self::Javascript => "npm ci && npm run build -- $WIT app.wasm",
            Self::Python => {
                "pip install -r requirements.txt && \
                 componentize-py -w wasi:http/proxy -d $WIT componentize app -o app.wasm"
            }
            Self::C => "make WIT=$WIT",
        }
    }
}

/// Makes the folder, and prints what is in it.
pub fn new(output: Output, arguments: New) -> Result<(), Error> {
    let New { lang, directory } = arguments;
    write(&directory, lang.files())?;
    let row = |(path, _): &File| FileRow { path: directory.join(path).display().to_string() };
    let rows: Vec<_> = lang.files().iter().map(row).collect();
    print(&render::list(output, &rows))?;
    let build = lang.build();
    eprintln!("Build it there: {build}");
    if build.contains("$WIT") {
        eprintln!("WIT is the folder of WASI 0.2's WIT files, such as wit of the crate wasip2.");
    }
    Ok(())
}

fn write(directory: &Path, files: &[File]) -> Result<(), Error> {
    let failed =
        |error: io::Error| Error::Usage(format!("cannot make {}: {error}", directory.display()));
    fs::create_dir_all(directory).map_err(failed)?;
    if fs::read_dir(directory).map_err(failed)?.next().is_some() {
        let problem = format!("{} is not empty: name another folder", directory.display());
        return Err(Error::Usage(problem));
    }
    for (path, contents) in files {
        let path = directory.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        fs::write(path, contents).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_once_and_nothing_in_it_is_written_over() {
        let directory = tempfile::tempdir().unwrap();
        for lang in Language::value_variants() {
            let folder = directory.path().join(format!("{lang:?}"));
            write(&folder, lang.files()).unwrap();
            for (path, contents) in lang.files() {
                assert_eq!(&fs::read_to_string(folder.join(path)).unwrap(), contents);
            }
            fs::write(folder.join("mine"), "").unwrap();
            let error = write(&folder, lang.files()).unwrap_err().to_string();
            assert!(error.contains("is not empty"), "{error}");
        }
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(write(&file, Language::C.files()).unwrap_err().to_string().contains("cannot make"));
    }
}
