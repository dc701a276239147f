//! `warren function`.

mod deploy;
mod logs;
mod scaffold;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use warren_proto::v1::{FunctionAlias, WeightedVersion};

use crate::args::Output;
use crate::client::Client;
use crate::commands::print;
use crate::duration::Milliseconds;
use crate::error::Error;
use crate::render::{
    self, AliasRow, DeletedRow, FunctionRow, VersionRow, alias_rows, version_rows,
};

pub use scaffold::new;

#[derive(Debug, Subcommand)]
pub enum FunctionCommand {
    /// Publish a version of a function, which is made if it is not there.
    Deploy(Deploy),
    /// List the functions.
    Ls {
        /// Only of this VPC.
        #[arg(long, value_name = "NAME")]
        vpc: Option<String>,
    },
    /// Show the versions of a function.
    Show {
        /// Function.
        name: String,
    },
    /// Delete functions that no trigger leads to, with all their versions and aliases.
    Rm {
        /// Functions.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Names for versions, which triggers lead to.
    #[command(subcommand)]
    Alias(AliasCommand),
    /// Show what its instances wrote to standard output and error, and what the runtime says of them.
    Logs(logs::Logs),
    /// Make a new function's folder, from an example.
    New(New),
}

#[derive(Debug, Args)]
pub struct Deploy {
    /// Name: lower-case letters, digits and inner hyphens.
    pub name: String,
    /// A WebAssembly component for the world wasi:http/proxy of WASI 0.2.
    pub file: PathBuf,
    /// VPC that its instances stand in.
    #[arg(long, value_name = "NAME")]
    pub vpc: String,
    /// Memory of an instance, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64,
        value_parser = clap::value_parser!(u64).range(1..=384))]
    pub memory: u64,
    /// The longest that a call may take, such as 500ms, 3s or 2m.
    #[arg(long, value_name = "TIME", default_value = "3s")]
    pub timeout: Milliseconds,
    /// A variable of its environment. May be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    pub environment: Vec<(String, String)>,
    /// A file that it sees, read-only, as this path. May be repeated.
    #[arg(long = "file", value_name = "PATH=FILE", value_parser = pair)]
    pub files: Vec<(String, String)>,
    /// Template that its instances are clones of.
    #[arg(long, value_name = "NAME", default_value = "runtime")]
    pub template: String,
    /// Most calls at one time; 0: no limit of its own.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub concurrency: u32,
    /// Make its instantiation, start functions included, part of its image.
    #[arg(long)]
    pub init_snapshot: bool,
    /// Let an instance answer any number of calls, one after the other: without it each call has a microVM
    /// of its own.
    #[arg(long)]
    pub reuse: bool,
}

#[derive(Debug, Subcommand)]
pub enum AliasCommand {
    /// Have an alias stand for a version, or for several that share its calls by weight.
    Set {
        /// Function.
        name: String,
        /// Alias.
        alias: String,
        /// Such as 7, or 7=90 8=10.
        #[arg(required = true, value_name = "VERSION[=WEIGHT]")]
        versions: Vec<Share>,
    },
    /// Have an alias stand for what it was before; once more undoes that.
    Rollback {
        /// Function.
        name: String,
        /// Alias.
        alias: String,
    },
    /// List the aliases of a function.
    Ls {
        /// Function.
        name: String,
    },
    /// Delete an alias that no trigger leads to.
    Rm {
        /// Function.
        name: String,
        /// Alias.
        alias: String,
    },
}

#[derive(Debug, Args)]
pub struct New {
    /// Its language.
    #[arg(long, value_enum)]
    pub lang: scaffold::Language,
    /// Folder to make; one that is there must be empty.
    pub directory: PathBuf,
}

/// A version, and its part of an alias's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(WeightedVersion);

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, weight) = text.split_once('=').unwrap_or((text, "1"));
        let parsed = number.parse().ok().zip(weight.parse().ok());
        let (number, weight) =
            parsed.ok_or("write the version's number, or NUMBER=WEIGHT, such as 7=90")?;
        Ok(Self(WeightedVersion { number, weight }))
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (left, right) = text.split_once('=').ok_or("there is no = in it")?;
    Ok((left.to_owned(), right.to_owned()))
}

/// Runs the command, but for `new`, which needs no control plane.
pub async fn run(
    mut client: Client,
    output: Output,
    command: FunctionCommand,
) -> Result<(), Error> {
    match command {
        FunctionCommand::Deploy(deploy) => deploy::run(client, output, deploy).await,
        FunctionCommand::Ls { vpc } => {
            let functions = client.functions(vpc.unwrap_or_default()).await?;
            let rows: Vec<_> = functions.into_iter().map(FunctionRow::from).collect();
            print(&render::list(output, &rows))
        }
        FunctionCommand::Show { name } => {
            let rows: Vec<VersionRow> = version_rows(client.function(name).await?);
            print(&render::list(output, &rows))
        }
        FunctionCommand::Rm { names } => {
            let mut rows = Vec::new();
            for name in names {
                client.delete_function(name.clone()).await?;
                rows.push(DeletedRow { name });
            }
            print(&render::list(output, &rows))
        }
        FunctionCommand::Logs(arguments) => logs::run(client, output, arguments).await,
        FunctionCommand::Alias(command) => alias(client, output, command).await,
        FunctionCommand::New(arguments) => new(output, arguments),
    }
}

async fn alias(mut client: Client, output: Output, command: AliasCommand) -> Result<(), Error> {
    let alias = match command {
        AliasCommand::Set { name, alias, versions } => {
            let versions = versions.into_iter().map(|Share(share)| share).collect();
            let alias = FunctionAlias { name: alias, versions, former: Vec::new() };
            client.set_alias(name, alias).await?
        }
        AliasCommand::Rollback { name, alias } => client.roll_back_alias(name, alias).await?,
        AliasCommand::Ls { name } => {
            return print(&render::list(output, &alias_rows(client.function(name).await?)));
        }
        AliasCommand::Rm { name, alias } => {
            client.delete_alias(name, alias.clone()).await?;
            return print(&render::list(output, &[DeletedRow { name: alias }]));
        }
    };
    print(&render::one(output, &AliasRow::from(alias)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_has_a_number_and_perhaps_a_weight() {
        let share = |text: &str| text.parse().map(|Share(share)| (share.number, share.weight));
        assert_eq!((share("7"), share("8=90")), (Ok((7, 1)), Ok((8, 90))));
        for text in ["", "v7", "7=", "7=x", "=1", "$LATEST"] {
            assert!(share(text).unwrap_err().contains("NUMBER=WEIGHT"), "{text}");
        }
        assert_eq!(pair("A=b=c"), Ok(("A".into(), "b=c".into())));
    }
}
