//! `cargo xtask examples`: functions in four languages, as components.
//!
//! Each is built in a copy of its folder, by the tools that `examples/README.md` names: what these
//! bring and leave stays below `target/examples`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::build::{no_std_cargo, results, root, target};
use crate::command::{output, run, step};
use crate::setup;

/// Makes C of WIT.
const WIT_BINDGEN: &str = "0.63.0";

/// The language of an example, and its folder's name.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Example {
    Rust,
    Javascript,
    Python,
    C,
}

impl Example {
    fn name(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::Javascript => "javascript",
            Self::Python => "python",
            Self::C => "c",
        }
    }

    /// All files of its folder.
    fn sources(self) -> &'static [&'static str] {
        match self {
            Self::Rust => &["Cargo.toml", "Cargo.lock", "src/lib.rs", "src/redis.rs"],
            Self::Javascript => &["package.json", "package-lock.json", "app.js", "build.js"],
            Self::Python => &["requirements.txt", "app.py"],
            Self::C => &["Makefile", "app.c"],
        }
    }

    /// Programs that building it takes, besides cargo.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Rust => &[],
            Self::Javascript => &["npm"],
            Self::Python => &["python3"],
            Self::C => &["make", "clang-22"],
        }
    }

    /// The component.
    pub fn component(self) -> PathBuf {
        folder().join(self.name()).with_extension("wasm")
    }

    fn build(self) -> Result<()> {
        for program in self.programs() {
            if !setup::on_path(program) {
                bail!("`{program}` is missing: on Debian, `cargo xtask setup` installs it");
            }
        }
        let stage = self.stage()?;
        match self {
            Self::Rust => {
                rust(&stage, "examples/build/rust/target", "redis_counter", &self.component())
            }
            Self::Javascript => javascript(&stage, &self.component()),
            Self::Python => python(&stage, &self.component()),
            Self::C => c(&stage, &self.component()),
        }
    }

    fn is_current(self) -> bool {
        let source = root().join("examples").join(self.name());
        let mut inputs: Vec<_> = self.sources().iter().map(|name| source.join(name)).collect();
        // Which WIT it is built with, and how.
        inputs.extend([manifest().with_extension("lock"), root().join("xtask/src/examples.rs")]);
        modified(&self.component())
            .is_some_and(|built| inputs.iter().all(|file| modified(file) <= Some(built)))
    }

    /// Copies its folder to where it is built.
    fn stage(self) -> Result<PathBuf> {
        let source = root().join("examples").join(self.name());
        let stage = folder().join("build").join(self.name());
        for name in self.sources() {
            let (from, to) = (source.join(name), stage.join(name));
            fs::create_dir_all(to.parent().unwrap_or(&stage))?;
            fs::copy(&from, &to).with_context(|| format!("no {}", from.display()))?;
        }
        Ok(stage)
    }
}

/// Builds those that are named, or all; not those that are newer than what they are made of.
///
/// # Errors
/// A tool is missing, or fails.
pub fn build(named: &[Example]) -> Result<()> {
    let examples = if named.is_empty() { Example::value_variants() } else { named };
    for example in examples {
        let component = example.component();
        let current = example.is_current();
        if !current {
            step("examples", &format!("building {}", example.name()));
            example.build()?;
        }
        let size =
            fs::metadata(&component).with_context(|| format!("no {}", component.display()))?.len();
        let already = if current { ", as it was" } else { "" };
        step("examples", &format!("{}: {} KiB{already}", component.display(), size.div_ceil(1024)));
    }
    Ok(())
}

/// Builds the component of `vmm`'s tests, and its package.
///
/// # Errors
/// A tool is missing, or fails.
pub fn test_component() -> Result<()> {
    let component = folder().join("test-component.wasm");
    fs::create_dir_all(folder())?;
    let source = root().join("tests/component");
    rust(&source, "examples/build/test-component", "test_component", &component)?;
    // The files that the tests read.
    let arguments =
        ["--reuse", "--file", "data/manifest=Cargo.toml", "--file", "data/deep/lib=src/lib.rs"];
    package(&source, &component, &results().join("test-component.package"), &arguments)
}

/// Makes a package of a component, of whose files the paths are from a folder on.
fn package(folder: &Path, component: &Path, package: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(results().join("warren-package"));
    command.current_dir(folder);
    run(command.arg(component).arg("--output").arg(package).args(arguments))
}

/// The folder of the components.
fn folder() -> PathBuf {
    target().join("examples")
}

/// By the compiler of the guest. It has no library of `wasm32-wasip2`, and needs none: the crate
/// `wasip2` calls WASI itself.
fn rust(source: &Path, target_folder: &str, library: &str, component: &Path) -> Result<()> {
    let mut command = no_std_cargo(target_folder);
    command.current_dir(source);
    command.args(["--quiet", "--locked", "--target", "wasm32-unknown-unknown"]);
    command.arg("-Zbuild-std=std,panic_abort");
    let linker = Linker::find()?;
    command.env("PATH", &linker.path);
    command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", &linker.program);
    run(&mut command)?;
    let built = target().join(target_folder).join("wasm32-unknown-unknown/release").join(library);
    copy_if_newer(&built.with_extension("wasm"), component)
}

fn copy_if_newer(from: &Path, to: &Path) -> Result<()> {
    if modified(to) < modified(from) {
        fs::copy(from, to).with_context(|| format!("no {}", from.display()))?;
    }
    Ok(())
}

fn javascript(stage: &Path, component: &Path) -> Result<()> {
    let npm = || {
        let mut command = Command::new("npm");
        command.current_dir(stage);
        command
    };
    step("examples", "componentize-js and what it needs, by npm");
    run(npm().args(["install", "--silent", "--no-audit", "--no-fund"]))?;
    run(npm().args(["run", "--silent", "build", "--"]).arg(wit()?).arg(component))
}

fn python(stage: &Path, component: &Path) -> Result<()> {
    step("examples", "componentize-py, by pip");
    let venv = stage.join("venv");
    run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(venv.join("bin/pip"));
    pip.current_dir(stage).args(["install", "--quiet", "--disable-pip-version-check"]);
    run(pip.args(["--requirement", "requirements.txt"]))?;
    let mut command = Command::new(venv.join("bin/componentize-py"));
    command.current_dir(stage).args(["--quiet", "--world", "wasi:http/proxy", "--wit-path"]);
    run(command.arg(wit()?).args(["componentize", "app", "--output"]).arg(component))
}

/// By Debian's clang and library of C, which make modules of WASI's first preview, and the linker,
/// which makes components of such.
fn c(stage: &Path, component: &Path) -> Result<()> {
    let linker = Linker::find()?;
    let compiler = format!(
        "clang-22 --target=wasm32-wasi -Wno-deprecated -fuse-ld={}",
        linker.program.display()
    );
    let mut command = Command::new("make");
    command.current_dir(stage).env("PATH", &linker.path).args(["--quiet", "--always-make"]);
    command.arg(format!("CC={compiler}")).arg(format!("WIT={}", wit()?.display()));
    run(command.arg(format!("WIT_BINDGEN={}", wit_bindgen()?.display())))?;
    fs::copy(stage.join("app.wasm"), component)?;
    Ok(())
}

/// The linker of components, which every toolchain of rustup has.
struct Linker {
    program: PathBuf,
    /// A `PATH` on which it finds the linker of modules.
    path: OsString,
}

impl Linker {
    fn find() -> Result<Self> {
        let libraries = output(Command::new("rustc").args(["--print", "target-libdir"]))?;
        let programs = Path::new(libraries.trim()).with_file_name("bin");
        let program = programs.join("wasm-component-ld");
        ensure!(program.exists(), "no {}: install Rust by rustup", program.display());
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(programs.join("gcc-ld")).chain(std::env::split_paths(&path));
        Ok(Self { program, path: std::env::join_paths(folders)? })
    }
}

/// The folder of WASI's WIT files: those that the example in Rust depends on, which are in a crate.
fn wit() -> Result<PathBuf> {
    let vendor = folder().join("vendor");
    let mut command = Command::new("cargo");
    command.args(["vendor", "--quiet", "--locked", "--manifest-path"]).arg(manifest()).arg(&vendor);
    output(&mut command)?;
    Ok(vendor.join("wasip2/wit"))
}

/// The manifest of the example in Rust.
fn manifest() -> PathBuf {
    root().join("examples/rust/Cargo.toml")
}

fn wit_bindgen() -> Result<PathBuf> {
    let tools = folder().join(format!("wit-bindgen-{WIT_BINDGEN}"));
    let program = tools.join("bin/wit-bindgen");
    if !program.exists() {
        step("examples", "installing wit-bindgen: a minute or two");
        let mut command = Command::new("cargo");
        // It runs for a moment: what optimizing it takes would never come back.
        command.args(["install", "--quiet", "--locked", "--debug", "wit-bindgen-cli"]);
        command.args(["--version", WIT_BINDGEN, "--no-default-features", "--features", "c"]);
        run(command.arg("--root").arg(&tools).env("CARGO_PROFILE_DEV_DEBUG", "false"))?;
    }
    Ok(program)
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|metadata| metadata.modified()).ok()
}
