//! `warren-package`: makes a function's package of a component, by hand.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use warren_function::compile::compile;
use warren_function::options::Options;

/// Compiles a WebAssembly component that you trust, and puts it with its options into a package, of
/// which `warren-vmm image` makes a function's image.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The component
    component: PathBuf,
    /// Where to write the package
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// The most that its linear memories may have together, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory: u32,
    /// The longest that a call may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    timeout: u32,
    /// A variable of its environment; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// A file that it sees, and what it contains; may be given several times
    #[arg(long, value_name = "PATH=FILE", value_parser = pair)]
    file: Vec<(String, String)>,
    /// Let it initialise itself before its image is made
    #[arg(long)]
    initialise: bool,
    /// Let a microVM answer any number of calls, one after the other
    #[arg(long)]
    reuse: bool,
}

fn pair(argument: &str) -> Result<(String, String), String> {
    let pair = argument.split_once('=').ok_or("there is no = in it")?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let files = arguments.file.into_iter().map(|(path, file)| Ok((path, read(file.as_ref())?)));
    let options = Options {
        environment: arguments.env,
        memory_bytes: u64::from(arguments.memory) << 20,
        timeout_ms: arguments.timeout,
        files: files.collect::<anyhow::Result<_>>()?,
        initialise: arguments.initialise,
        reuse: arguments.reuse,
    };
    let package = options.package(&compile(&read(&arguments.component)?)?)?;
    let output = &arguments.output;
    fs::write(output, package).with_context(|| output.display().to_string())
}
