//! warren: drives the control plane from a shell.

mod args;
mod capture;
mod client;
mod commands;
mod drain;
mod drops;
mod duration;
mod error;
mod flows;
mod function;
mod probe;
mod render;
mod route;
mod security;
mod snapshots;
mod trigger;

use std::process::ExitCode;

use clap::Parser;

/// One thread is enough for waiting.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = args::Arguments::parse();
    match commands::run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            error.exit_code().into()
        }
    }
}
