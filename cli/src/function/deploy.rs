//! `warren function deploy`.

use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use warren_proto::v1::deploy_function_request::Part;
use warren_proto::v1::{DeployFunctionRequest, EnvironmentVariable, FunctionFile, FunctionOptions};

use super::Deploy;
use crate::args::Output;
use crate::client::Client;
use crate::commands::print;
use crate::error::Error;
use crate::render::{self, DeployedRow};

/// How much of the component goes into one message, in bytes.
const PIECE: usize = 256 << 10;

/// Deploys, and prints the version. On a terminal it shows how far it is.
pub async fn run(mut client: Client, output: Output, deploy: Deploy) -> Result<(), Error> {
    let component = read(&deploy.file)?;
    let options = options(deploy)?;
    let bytes = component.len() as u64;
    let bar = ProgressBar::new(bytes);
    // Only a template that is wrong is refused, and there it is right.
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes}") {
        bar.set_style(style);
    }
    bar.set_message("uploading");
    let told = bar.clone();
    let mut at = 0;
    let pieces = std::iter::from_fn(move || {
        let end = component.len().min(at + PIECE);
        let piece = component.get(at..end).filter(|piece| !piece.is_empty());
        let Some(piece) = piece else {
            told.set_style(ProgressStyle::default_spinner());
            told.set_message("compiling and publishing");
            told.enable_steady_tick(Duration::from_millis(100));
            return None;
        };
        told.set_position(end as u64);
        at = end;
        Some(Part::Component(piece.to_vec()))
    });
    let parts = [Part::Options(options)].into_iter().chain(pieces);
    let messages = parts.map(|part| DeployFunctionRequest { part: Some(part) });
    let deployed = client.deploy_function(tokio_stream::iter(messages)).await;
    bar.finish_and_clear();
    let deployed = deployed?;
    for problem in &deployed.zones_left_out {
        eprintln!("warning: the package is not in zone {problem}");
    }
    print(&render::one(output, &DeployedRow::new(deployed)?))
}

fn options(deploy: Deploy) -> Result<FunctionOptions, Error> {
    let environment = deploy.environment.into_iter();
    let files = deploy.files.into_iter();
    let file = |(path, file): (String, String)| {
        Ok(FunctionFile { path, contents: read(Path::new(&file))? })
    };
    Ok(FunctionOptions {
        name: deploy.name,
        vpc: deploy.vpc,
        template: deploy.template,
        memory_bytes: deploy.memory << 20,
        timeout_ms: deploy.timeout.0,
        concurrency: deploy.concurrency,
        environment: environment.map(|(name, value)| EnvironmentVariable { name, value }).collect(),
        files: files.map(file).collect::<Result<_, Error>>()?,
        initialise: deploy.init_snapshot,
        reuse: deploy.reuse,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path)
        .map_err(|error| Error::Usage(format!("cannot read {}: {error}", path.display())))
}
